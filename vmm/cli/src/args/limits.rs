//! Rate limits as the options of devices say them.

use std::num::NonZeroU64;

use devices::{Bucket, Limits};

use super::units;

/// Takes `bandwidth=RATE` or `iops=N` in; whether `part` is one of them.
pub(crate) fn parse_part(limits: &mut Limits, part: &str) -> Result<bool, String> {
    match part.split_once('=') {
        Some(("bandwidth", rate)) => limits.bandwidth = Some(Bucket::per_second(units::rate(rate)?)),
        Some(("iops", count)) => {
            let count = count.parse::<NonZeroU64>();
            let count = count.map_err(|_| format!("expected iops=N with N above 0, got {part:?}"))?;
            limits.operations = Some(Bucket::per_second(count.get()));
        }
        _ => return Ok(false),
    }
    Ok(true)
}

/// Nothing but limits, of a device that has no other options.
pub(crate) fn alone(text: &str) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for part in text.split(',') {
        if !parse_part(&mut limits, part)? {
            return Err(format!("expected bandwidth=RATE, iops=N or both, got {part:?}"));
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_or_both_and_nothing_else() {
        let limits = alone("iops=500,bandwidth=10MB/s").unwrap();
        assert_eq!(limits.bandwidth, Some(Bucket::per_second(10_000_000)));
        assert_eq!(limits.operations, Some(Bucket::per_second(500)));
        assert_eq!(alone("iops=1").unwrap().bandwidth, None);
        for bad in [
            "",
            "iops",
            "iops=0",
            "iops=many",
            "bandwidth=10",
            "bandwidth=0MB/s",
            "iops=1,path=x",
        ] {
            assert!(alone(bad).is_err(), "{bad}");
        }
    }
}
