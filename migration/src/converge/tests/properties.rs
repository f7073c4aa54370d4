//! Whatever it sees, the policy answers within bounds; whatever the guest does, it comes to an end.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use super::run::BLOCK;
use super::simulator::{MIB, Pattern, SimulatedVcpu, Simulation, goal};
use crate::converge::{Advice, Costs, Course, FLOOR, Goal, Observation, Policy};
use crate::options::OnMiss;

fn any_goal() -> impl Strategy<Value = Goal> {
    let rate = || prop_oneof![Just(None), Just(Some(0.0)), (1e3..1e11).prop_map(Some)];
    let deadline = prop_oneof![
        Just(None),
        (0..100_000_u64).prop_map(|ms| Some(Duration::from_millis(ms)))
    ];
    let on_miss = prop_oneof![Just(OnMiss::Fail), Just(OnMiss::Switch)];
    (
        0..5000_u64,
        deadline,
        on_miss,
        rate(),
        rate(),
        any::<bool>(),
        0..5_usize,
        0..100_u32,
    )
        .prop_map(
            |(max, deadline, on_miss, final_bandwidth, bandwidth, throttle, cpus, max_rounds)| Goal {
                deadline,
                on_miss,
                final_bandwidth,
                bandwidth,
                throttle,
                cpus,
                max_rounds,
                ..goal(max)
            },
        )
}

/// Anything, with extremes more often than by chance.
fn any_bytes() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), 0..(1_u64 << 34), any::<u64>()]
}

fn check(advice: &Advice, cpus: usize) -> Result<(), TestCaseError> {
    for cpu in 0..cpus + 1 {
        prop_assert!((0.0..=FLOOR).contains(&advice.throttle.of(cpu)), "{advice:?}");
    }
    prop_assert!((0.0..=FLOOR).contains(&advice.throttle.mean()));
    prop_assert!(advice.prediction.dirty_rate >= 0.0 && advice.prediction.dirty_rate.is_finite());
    prop_assert!(advice.prediction.bandwidth > 0.0 && advice.prediction.bandwidth.is_finite());
    if matches!(advice.course, Course::Miss(_)) {
        prop_assert!(advice.throttle.is_off(), "released at the end");
    }
    if let Course::Miss(miss) = &advice.course {
        prop_assert!(!miss.to_string().contains("NaN"), "{miss}");
        prop_assert!(miss.bandwidth.is_finite() && miss.dirty_rate.is_finite());
        prop_assert!(miss.needed_bandwidth.is_none_or(f64::is_finite));
    }
    Ok(())
}

proptest! {
    #[test]
    fn nonsense_is_answered_within_bounds(
        goal in any_goal(),
        costs in vec(any::<u64>(), 0..4),
        bursts in vec((any_bytes(), any::<u64>()), 0..4),
        seen in vec((vec(any_bytes(), 10), any::<u32>(), any::<bool>(), vec(any_bytes(), 0..5)), 1..60),
    ) {
        let cpus = goal.cpus;
        let mut policy = Policy::new(goal);
        for (bytes, nanos) in bursts {
            policy.burst(bytes, Duration::from_nanos(nanos));
        }
        for cost in costs {
            policy.set_costs(&[Costs { restore: Duration::from_nanos(cost), ..Costs::default() }]);
        }
        for (numbers, round, end_of_round, by_vcpu) in &seen {
            let advice = policy.observe(&Observation {
                at: Duration::from_nanos(numbers[0]),
                round: *round,
                end_of_round: *end_of_round,
                unsent: numbers[1],
                hot: numbers[8],
                put_off: numbers[9],
                all_streams: numbers[9] % 2 == 0,
                dirty: numbers[3],
                copied: numbers[4],
                copied_data: numbers[5],
                wire: numbers[6],
                late: Duration::from_nanos(numbers[7]),
                by_vcpu,
            });
            check(&advice, cpus)?;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_migration_ends_and_keeps_what_it_does_not_miss(
        goal in any_goal(),
        link in 2e8..4e9,
        noise in 0.0..0.2,
        rate in 0.0..2e9,
        size in 1..512_u64,
        random in any::<bool>(),
        change in prop_oneof![Just(None), (0.0..3.0, 0.0..8.0).prop_map(Some)],
        seed in any::<u64>(),
    ) {
        let pattern = if random { Pattern::Random } else { Pattern::Sweep };
        let cap = |cap: Option<f64>| cap.map(|cap| cap.max(1e8));
        let goal = Goal {
            cpus: 1,
            bandwidth: cap(goal.bandwidth),
            final_bandwidth: cap(goal.final_bandwidth),
            max_rounds: goal.max_rounds.clamp(1, 20),
            ..goal
        };
        let world = Simulation {
            link,
            noise,
            change,
            seed,
            memory: 1024 * MIB,
            ..Simulation::new(goal, vec![SimulatedVcpu::new(0, size * MIB, rate, pattern)])
        };
        let outcome = world.run();
        prop_assert!(outcome.rounds <= world.goal.max_rounds);
        let most = outcome.history.iter().map(|point| point.off).fold(0.0, f64::max);
        let allowed = if world.goal.throttle { FLOOR } else { 0.0 };
        prop_assert!(most <= allowed);
        match outcome.course {
            Course::Continue => prop_assert!(false, "the simulator stops at a course only"),
            Course::Miss(_) => prop_assert!(outcome.missed && world.goal.on_miss == OnMiss::Fail),
            Course::Switch if outcome.missed => prop_assert_eq!(world.goal.on_miss, OnMiss::Switch),
            Course::Switch => {
                let budget = world.goal.max_downtime.as_secs_f64();
                // The guest writes whole blocks, where a real one writes pages: two of them more or less are chance.
                let grain = 2.0 * BLOCK as f64 / world.goal.final_bandwidth.unwrap_or(link).min(link);
                prop_assert!(outcome.downtime <= budget + grain, "{} > {budget}", outcome.downtime);
                let deadline = world.goal.deadline.map_or(f64::INFINITY, |deadline| deadline.as_secs_f64());
                prop_assert!(outcome.total <= deadline * 1.02, "{} > {deadline}", outcome.total);
            }
        }
    }
}
