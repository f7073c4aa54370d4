//! The parts by themselves.

use std::time::Duration;

use crate::converge::estimate::{Bandwidth, DirtyRate, Meter, ObservedStep};
use crate::converge::throttle::{Demand, Throttler};
use crate::converge::working_set::WorkingSet;
use crate::converge::{Costs, FLOOR, Miss, Observation, Reason};

fn sent(bytes: f64, elapsed: f64) -> ObservedStep {
    ObservedStep {
        elapsed,
        delivered: bytes,
        data: bytes,
        ..ObservedStep::default()
    }
}

#[test]
fn the_costs_add_up() {
    let ms = Duration::from_millis;
    let costs = Costs {
        pause: ms(1),
        drain: ms(2),
        final_log: ms(4),
        state: ms(8),
        restore: ms(16),
        resume: ms(32),
        round_trip: ms(64),
    };
    assert_eq!(costs.total(), ms(127));
    assert_eq!(
        Costs {
            drain: Duration::MAX,
            ..costs
        }
        .total(),
        Duration::MAX
    );
}

#[test]
fn dirtied_is_what_was_marked_beyond_what_was_cleared() {
    let mut meter = Meter::default();
    let seen = |at, dirty, copied, wire| Observation {
        at: Duration::from_millis(at),
        dirty,
        copied,
        copied_data: copied / 2,
        wire,
        ..Observation::default()
    };
    meter.step(&seen(0, 1000, 0, 0));
    let step = meter.step(&seen(10, 700, 400, 300));
    assert_eq!(
        (step.dirtied, step.data, step.zero, step.delivered),
        (100.0, 200.0, 200.0, 300.0)
    );
    assert!((step.elapsed - 0.01).abs() < 1e-9);
    // Backwards counts as nothing, and what comes after it not twice.
    assert_eq!(meter.step(&seen(5, 600, 400, 200)).dirtied, 0.0);
    assert_eq!(meter.step(&seen(20, 750, 400, 300)).dirtied, 50.0);
}

#[test]
fn bandwidth_is_a_low_percentile_of_busy_steps() {
    let mut link = Bandwidth::default();
    assert!(!link.is_known());
    assert_eq!(
        (link.usual(), link.recent()),
        (Bandwidth::ASSUMED, Bandwidth::ASSUMED)
    );
    for speed in 1..=40 {
        link.add(&sent(f64::from(speed) * 1e6, 0.01), 1.0, 1e-4);
    }
    assert_eq!((link.usual(), link.median()), (1.1e9, 2.1e9));
    // The later half: from 21 to 40, as the first of all was the opening.
    assert_eq!(link.recent(), 3.05e9);
    assert!(link.worst() < 0.3e9);
    // None of these says anything about the link.
    let before = link.median();
    for _ in 0..40 {
        link.add(&sent(1e9, 0.001), 1.0, 1e-4);
        link.add(&sent(1000.0, 0.01), 1.0, 1e-4);
        link.add(
            &ObservedStep {
                zero: 1e9,
                ..sent(1e6, 0.01)
            },
            1.0,
            1e-4,
        );
        link.add(
            &ObservedStep {
                end_of_round: true,
                ..sent(1e6, 0.01)
            },
            1.0,
            0.05,
        );
        link.push(f64::NAN);
        link.push(f64::INFINITY);
    }
    assert_eq!(link.median(), before);
    // What is old is forgotten; compressed pages count with their size in memory.
    for _ in 0..64 {
        link.add(&sent(5e6, 0.01), 3.0, 1e-4);
    }
    assert_eq!(link.median(), 1.5e9);
}

#[test]
fn the_dirty_rate_is_that_of_the_last_moments() {
    let mut rate = DirtyRate::default();
    assert_eq!(rate.rate(), 0.0);
    for n in 0..100 {
        let dirtied = if n < 50 { 1e7 } else { 2e6 };
        rate.add(&ObservedStep {
            elapsed: 0.01,
            dirtied,
            ..ObservedStep::default()
        });
        if n == 49 {
            assert!((rate.rate() / 1e9 - 1.0).abs() < 1e-6);
        }
    }
    assert!((rate.rate() / 2e8 - 1.0).abs() < 1e-6);
}

#[test]
fn a_working_set_is_found_in_a_fifth_of_round_1() {
    for (share, frequency) in [(1.0, 2.0_f64), (0.5, 6.0), (0.1, 15.0)] {
        let mut set = WorkingSet::new();
        let (mut clean, bytes, dt) = (0.0, 5e6, 0.01);
        for _ in 0..50 {
            let before = clean + share * bytes;
            clean = clean * (-frequency * dt).exp() + share * bytes * (1.0 - frequency * dt / 2.0);
            set.add(
                &ObservedStep {
                    dirtied: before - clean,
                    ..sent(bytes, dt)
                },
                1.0,
            );
        }
        let model = set.model().expect("enough was dirtied");
        assert!((model.frequency / frequency).ln().abs() < 0.35, "{model:?}");
        assert!((model.share / share - 1.0).abs() < 0.2, "{model:?}");
        let size = set.size(model, 1e9);
        assert!((size / (share * 1.25e9) - 1.0).abs() < 0.2, "{size}");
        // All that is hot is dirtied again in the end.
        assert!((model.again(0.0, 1e3) - model.clean).abs() < 1.0);
    }
}

#[test]
fn a_quiet_guest_has_no_working_set() {
    let mut set = WorkingSet::new();
    (0..50).for_each(|_| set.add(&sent(5e6, 0.01), 1.0));
    assert_eq!(set.model(), None);
}

#[test]
fn the_target_is_dealt_out_like_water() {
    let mut throttler = Throttler::new(4);
    let demand = Some(Demand {
        limit: 500e6,
        target: 400e6,
    });
    let mut pages = [0_u64; 4];
    let mut on = [1.0; 4];
    let wanted = [20e6, 100e6, 600e6, 1200e6];
    for _ in 0..100 {
        let mut dirtied = 0.0;
        for cpu in 0..4 {
            pages[cpu] += (wanted[cpu] * on[cpu] * 0.01 / 4096.0) as u64;
            dirtied += wanted[cpu] * on[cpu] * 0.01;
        }
        throttler.step(0.01, dirtied, &pages, demand);
        on = [0, 1, 2, 3].map(|cpu| 1.0 - throttler.throttle().of(cpu));
    }
    // 20 and 100 run freely, the others share the 280 that are left.
    assert_eq!(on[..2], [1.0, 1.0]);
    assert!((on[2] * wanted[2] / 140e6 - 1.0).abs() < 0.1, "{on:?}");
    assert!((on[3] * wanted[3] / 140e6 - 1.0).abs() < 0.1, "{on:?}");
    throttler.step(0.0, 0.0, &pages, None);
    assert!(throttler.is_off() && throttler.throttle().is_off());
}

#[test]
fn the_throttle_stops_at_the_floor() {
    let mut throttler = Throttler::new(2);
    let demand = Some(Demand {
        limit: 0.0,
        target: 0.0,
    });
    for _ in 0..200 {
        // Dirtied by devices, so that it does not help.
        throttler.step(0.01, 1e7, &[], demand);
    }
    assert!(throttler.is_exhausted());
    assert!((throttler.throttle().mean() - FLOOR).abs() < 1e-9);
    assert_eq!(throttler.throttle().of(7), 0.0);
}

#[test]
fn a_miss_is_a_sentence_with_numbers() {
    let miss = |reason| Miss {
        reason,
        max_downtime: Duration::from_millis(20),
        deadline: Some(Duration::from_secs(10)),
        at: Duration::from_secs(2),
        needed_bandwidth: Some(1.41e9),
        bandwidth: 500e6,
        dirty_rate: 1.2e9,
        attainable_downtime: Duration::from_micros(623_400),
        attainable_total: Some(Duration::from_secs(42)),
        throttle: false,
    };
    assert_eq!(
        miss(Reason::DirtyRate).to_string(),
        "a downtime of 20 ms cannot be kept: the guest dirties 1.2 GB/s and the link carries 500 MB/s; it takes \
         1.4 GB/s, or 42.0 s of total time, or a downtime of 623 ms, or leave to slow the guest down"
    );
    assert!(
        miss(Reason::Deadline)
            .to_string()
            .starts_with("the deadline of 10.0 s cannot be kept")
    );
    assert!(
        miss(Reason::Costs)
            .to_string()
            .contains("takes 623 ms; allow at least that")
    );
    assert!(miss(Reason::Rounds).to_string().contains("in the rounds allowed"));
}
