//! The bars that the project promises.

use std::time::Duration;

use super::simulator::{MIB, Pattern, Vcpu, World, goal};
use crate::convergence::{Goal, Verdict};

#[test]
fn explore() {
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
        ("overload sweep", overload(Pattern::Sweep, 1.2e9)),
        ("overload random", overload(Pattern::Random, 1.2e9)),
        ("overload greedy", overload(Pattern::Sweep, 1e12)),
        ("qemu sweep", capped(Pattern::Sweep)),
        (
            "qemu sweep scattered",
            World {
                scattered: true,
                bursts: true,
                ..capped(Pattern::Sweep)
            },
        ),
        (
            "overload sweep scattered",
            World {
                scattered: true,
                ..overload(Pattern::Sweep, 1.2e9)
            },
        ),
        ("qemu random", capped(Pattern::Random)),
    ] {
        let outcome = world.run();
        println!(
            "{name}: {:?} rounds {} downtime {:.2} ms (predicted {:.2}), total {:.3} s (predicted {:?}) dirty {:.1} MB off {:?}",
            outcome.verdict,
            outcome.rounds,
            outcome.downtime * 1e3,
            outcome.predicted.downtime.as_secs_f64() * 1e3,
            outcome.total,
            outcome.predicted_total(),
            outcome.dirty / 1e6,
            outcome.most_off,
        );
        if !world.vcpus.is_empty() && outcome.most_off[0] > 0.0 {
            let ideal = ideal_duty(&world, outcome.dirty, outcome.total - outcome.downtime);
            let r = world.vcpus[0].rate.min(1.2e9);
            println!(
                "   ideal duty {ideal:.3}, fraction {:.3}",
                outcome.work / (r * ideal * (outcome.total - outcome.downtime))
            );
            let mut last = 0.0;
            for p in &outcome.history {
                if p.at - last > 0.2 && false {
                    print!(
                        " {:.2}/{:.0}/{:.0}/{:.2}",
                        p.off,
                        p.prediction.dirty_rate / 1e6,
                        p.dirty / 1e6,
                        p.prediction.total.map_or(0.0, |t| t.as_secs_f64())
                    );
                    last = p.at;
                }
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
