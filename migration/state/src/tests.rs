//! Envelopes with records of several versions, cut and changed at every byte.

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{Envelope, MAX_NAME_LEN, MAX_PAYLOAD_LEN, MAX_RECORDS, Record, StateError, assert_golden};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct TimerState {
    ticks: u64,
    label: String,
    bytes: Vec<u8>,
}

impl Record for TimerState {
    const KIND: &'static str = "timer";
    const VERSION: u16 = 3;

    fn upgrade(version: u16, payload: &[u8]) -> Result<Self, StateError> {
        if version != 2 {
            return Err(StateError::Version {
                kind: Self::KIND,
                expected: Self::VERSION,
                got: version,
            });
        }
        let ticks: u64 = postcard::from_bytes(payload).map_err(|source| StateError::Payload {
            kind: Self::KIND,
            version,
            source,
        })?;
        Ok(TimerState {
            ticks,
            label: "upgraded".into(),
            bytes: Vec::new(),
        })
    }
}

/// The timer's layout before version 3, when it was a bare number of ticks.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct OldTimer(u64);

impl Record for OldTimer {
    const KIND: &'static str = "timer";
    const VERSION: u16 = 2;
}

/// A timer of a later release: one more field.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct WiderTimer(TimerState, u8);

impl Record for WiderTimer {
    const KIND: &'static str = "timer";
    const VERSION: u16 = 3;
}

fn timer(ticks: u64) -> TimerState {
    TimerState {
        ticks,
        label: "pit".into(),
        bytes: vec![1, 2, 3],
    }
}

#[test]
fn records_come_back_and_left_overs_are_named() {
    let mut envelope = Envelope::new();
    envelope.put("pit0", &timer(7)).unwrap();
    envelope.put("pit1", &timer(9)).unwrap();
    let mut back = Envelope::decode(&envelope.encode()).unwrap();
    assert!(back.has::<TimerState>("pit0"));
    assert_eq!(back.take::<TimerState>("pit0").unwrap(), timer(7));
    assert!(matches!(
        back.take::<TimerState>("pit0"),
        Err(StateError::Missing { .. })
    ));
    let error = back.finish().unwrap_err();
    assert!(error.to_string().contains("pit1 (timer v3)"), "{error}");
}

#[test]
fn an_older_version_is_upgraded_and_a_newer_one_refused() {
    let mut envelope = Envelope::new();
    envelope.put("old", &OldTimer(5)).unwrap();
    let mut back = Envelope::decode(&envelope.encode()).unwrap();
    assert_eq!(back.take::<TimerState>("old").unwrap().label, "upgraded");
    assert!(back.finish().is_ok());

    let mut envelope = Envelope::new();
    envelope.put("new", &timer(1)).unwrap();
    let error = envelope.take::<OldTimer>("new").unwrap_err();
    assert!(
        matches!(
            error,
            StateError::Version {
                kind: "timer",
                expected: 2,
                got: 3
            }
        ),
        "{error}"
    );
}

#[test]
fn a_payload_that_is_too_long_is_refused() {
    let mut envelope = Envelope::new();
    envelope.put("pit0", &WiderTimer(timer(1), 9)).unwrap();
    let error = envelope.take::<TimerState>("pit0").unwrap_err();
    assert!(
        matches!(error, StateError::PayloadTrailing { count: 1, .. }),
        "{error}"
    );
}

#[test]
fn limits_hold_on_the_way_in() {
    let mut envelope = Envelope::new();
    let long = "x".repeat(MAX_NAME_LEN + 1);
    assert!(matches!(
        envelope.put(&long, &timer(1)),
        Err(StateError::TooLarge { .. })
    ));
    let huge = TimerState {
        bytes: vec![0; MAX_PAYLOAD_LEN],
        ..timer(1)
    };
    assert!(matches!(
        envelope.put("pit0", &huge),
        Err(StateError::TooLarge { .. })
    ));
    envelope.put("pit0", &timer(1)).unwrap();
    assert!(matches!(
        envelope.put("pit0", &timer(2)),
        Err(StateError::Duplicate { .. })
    ));
    let large = TimerState {
        bytes: vec![0; MAX_PAYLOAD_LEN - 16],
        ..timer(1)
    };
    let fits = (1..)
        .take_while(|n| envelope.put(&format!("large{n}"), &large).is_ok())
        .count();
    assert_eq!(fits, 3, "the whole is held to 64 MiB");
    let mut envelope = Envelope::new();
    for n in 0..MAX_RECORDS {
        envelope.put(&format!("pit{n}"), &OldTimer(1)).unwrap();
    }
    assert!(matches!(
        envelope.put("one more", &OldTimer(1)),
        Err(StateError::TooLarge { .. })
    ));
}

#[test]
fn the_golden_envelope_is_still_read_and_written() {
    let mut envelope = Envelope::new();
    envelope.put("pit0", &OldTimer(300)).unwrap();
    let hex: String = envelope
        .encode()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(
        hex,
        "474f445749545354010031000000000000000100000004706974300574696d6572020002000000ac020e11a2a0a4bbe994"
    );
}

#[test]
fn golden_records_are_checked_both_ways() {
    assert_golden(3, "07 03 706974 03 010203", &timer(7));
    assert_golden(
        2,
        "ac02",
        &TimerState {
            ticks: 300,
            label: "upgraded".into(),
            bytes: vec![],
        },
    );
    let wrong = std::panic::catch_unwind(|| assert_golden(3, "08 03 706974 03 010203", &timer(7)));
    assert!(wrong.is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = Envelope::decode(&bytes);
    }

    #[test]
    fn a_damaged_envelope_is_refused(ticks in any::<u64>(), at in any::<prop::sample::Index>(), bit in 0u32..8) {
        let mut envelope = Envelope::new();
        envelope.put("pit0", &timer(ticks)).unwrap();
        let mut bytes = envelope.encode();
        let at = at.index(bytes.len());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Envelope::decode(&bytes).is_err());
        bytes[at] ^= 1u8 << bit;
        prop_assert!(Envelope::decode(&bytes[..at]).is_err());
        prop_assert_eq!(Envelope::decode(&bytes).unwrap(), envelope);
    }

    #[test]
    fn content_under_a_valid_checksum_is_read_or_refused(
        content in proptest::collection::vec(any::<u8>(), 0..256),
    ) {
        let mut bytes = b"GODWITST\x01\x00".to_vec();
        bytes.extend_from_slice(&(8 + 2 + 8 + content.len() as u64 + 8).to_le_bytes());
        bytes.extend_from_slice(&content);
        let checksum = xxhash_rust::xxh3::xxh3_64(&bytes);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        if let Ok(mut envelope) = Envelope::decode(&bytes) {
            let _ = envelope.take::<TimerState>("");
        }
    }

    #[test]
    fn payloads_are_read_or_refused(payload in proptest::collection::vec(any::<u8>(), 0..64), version in 0u16..5) {
        let _ = crate::record::decode::<TimerState>(version, &payload);
    }

    #[test]
    fn round_trip(records in proptest::collection::btree_map("[a-z0-9-]{0,64}", any::<(u64, String, Vec<u8>)>(), 0..20)) {
        let mut envelope = Envelope::new();
        for (name, (ticks, label, bytes)) in &records {
            envelope.put(name, &TimerState { ticks: *ticks, label: label.clone(), bytes: bytes.clone() }).unwrap();
        }
        let mut back = Envelope::decode(&envelope.encode()).unwrap();
        for (name, (ticks, label, bytes)) in records {
            prop_assert_eq!(back.take::<TimerState>(&name).unwrap(), TimerState { ticks, label, bytes });
        }
        prop_assert!(back.finish().is_ok());
    }
}
