//! The bars that the project promises.

use std::time::Duration;

use super::simulator::{MIB, Pattern, Vcpu, World, goal};
use crate::converge::{Goal, Verdict};

#[test]
fn explore2() {
    for (name, world) in [
        ("idle", World::new(goal(300), vec![])),
        (
            "300 sweep",
            World::new(goal(20), vec![Vcpu::new(0, 512 * MIB, 300e6, Pattern::Sweep)]),
        ),
        (
            "300 random",
            World::new(goal(20), vec![Vcpu::new(0, 512 * MIB, 300e6, Pattern::Random)]),
        ),
        (
            "1000 sweep",
            World::new(goal(30), vec![Vcpu::new(0, 512 * MIB, 1000e6, Pattern::Sweep)]),
        ),
        (
            "1000 sweep scattered",
            World {
                scattered: true,
                ..World::new(goal(30), vec![Vcpu::new(0, 512 * MIB, 1000e6, Pattern::Sweep)])
            },
        ),
        (
            "300 sweep scattered",
            World {
                scattered: true,
                ..World::new(goal(30), vec![Vcpu::new(0, 512 * MIB, 300e6, Pattern::Sweep)])
            },
        ),
        (
            "1000 random scattered",
            World {
                scattered: true,
                ..World::new(goal(30), vec![Vcpu::new(0, 512 * MIB, 1000e6, Pattern::Random)])
            },
        ),
        ("overload sweep", overload(Pattern::Sweep, 1.2e9)),
        ("overload random", overload(Pattern::Random, 1.2e9)),
        ("overload greedy", overload(Pattern::Sweep, 1e12)),
        (
            "overload sweep scattered",
            World {
                scattered: true,
                ..overload(Pattern::Sweep, 1.2e9)
            },
        ),
        (
            "overload greedy scattered",
            World {
                scattered: true,
                ..overload(Pattern::Sweep, 1e12)
            },
        ),
        (
            "qemu sweep",
            World {
                bursts: true,
                ..capped(Pattern::Sweep)
            },
        ),
        (
            "qemu random",
            World {
                bursts: true,
                ..capped(Pattern::Random)
            },
        ),
        (
            "qemu sweep scattered",
            World {
                scattered: true,
                bursts: true,
                ..capped(Pattern::Sweep)
            },
        ),
    ] {
        for noise in [0.05, 0.2] {
            print!("{name} {noise}:");
            for seed in 1..=8 {
                let mut world = World {
                    seed,
                    noise,
                    ..world.clone()
                };
                for v in &mut world.vcpus {
                    v.start(seed * 977);
                }
                let o = world.run();
                print!(
                    " {}{} {:.1}({:.1})ms {:.2}s{:+.0}%{:+.0}ms",
                    if o.verdict == Verdict::Switch { "" } else { "MISS" },
                    o.rounds,
                    o.downtime * 1e3,
                    o.predicted.downtime.as_secs_f64() * 1e3,
                    o.total,
                    (o.predicted_total().unwrap_or(0.0) / o.total - 1.0) * 100.0,
                    (o.predicted_total().unwrap_or(0.0) - o.total) * 1e3
                );
            }
            println!();
        }
    }
}
fn overload(pattern: Pattern, rate: f64) -> World {
    let goal = Goal {
        bandwidth: Some(500e6),
        final_bandwidth: Some(500e6),
        deadline: Some(Duration::from_secs(60)),
        ..goal(50)
    };
    World::new(goal, vec![Vcpu::new(0, 512 * MIB, rate, pattern)])
}

fn capped(pattern: Pattern) -> World {
    let goal = Goal {
        bandwidth: Some(200.0 * MIB as f64),
        ..goal(30)
    };
    World {
        memory: 1024 * MIB,
        ..World::new(goal, vec![Vcpu::new(0, 512 * MIB, 1000e6, pattern)])
    }
}

/// The largest constant duty that leaves so little dirty in the same time.
fn ideal_duty(world: &World, dirty: f64, total: f64) -> f64 {
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..10 {
        let duty = f64::midpoint(low, high);
        if world.time_at_duty(duty, dirty, total).is_some() {
            low = duty
        } else {
            high = duty
        }
    }
    low
}
