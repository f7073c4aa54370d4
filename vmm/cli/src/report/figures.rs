//! Figures as people read them.

use migration::IntervalMs;

const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];

/// Bytes with a binary unit and about three digits: `645 MiB`, `1.25 GiB`.
pub(crate) fn bytes(bytes: f64) -> String {
    let mut value = bytes.max(0.0);
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // Bytes come whole.
    let digits = if unit == 0 { 0 } else { decimals(value) };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// Bytes per second.
pub(crate) fn rate(bytes_per_s: f64) -> String {
    format!("{}/s", bytes(bytes_per_s))
}

/// Milliseconds as `0.35 ms`, `12.3 ms`, `4.20 s` or `2 min 5 s`.
pub(crate) fn duration(ms: f64) -> String {
    let ms = ms.max(0.0);
    if ms < 999.5 {
        return format!("{ms:.*} ms", decimals(ms));
    }
    let seconds = ms / 1e3;
    if seconds < 119.5 {
        return format!("{seconds:.*} s", decimals(seconds));
    }
    let whole = seconds.round() as u64;
    format!("{} min {} s", whole / 60, whole % 60)
}

/// A number that may not be known.
pub(crate) fn known(ms: Option<f64>) -> String {
    ms.map_or_else(|| "unknown".into(), duration)
}

/// A predicted time and what it is likely to be between, as far as they are known.
pub(crate) fn predicted(ms: Option<f64>, interval: Option<IntervalMs>) -> String {
    match interval {
        Some(IntervalMs { low, high }) if ms.is_some() => {
            format!("{}, likely {} to {}", known(ms), duration(low), duration(high))
        }
        _ => known(ms),
    }
}

/// Digits after the point that leave three that say something.
fn decimals(value: f64) -> usize {
    match value {
        0.0 => 0,
        value if value < 9.995 => 2,
        value if value < 99.95 => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_a_unit() {
        for (value, expected) in [
            (0.0, "0 B"),
            (512.0, "512 B"),
            (1536.0, "1.50 KiB"),
            (1_048_576_000.0, "0.98 GiB"),
            (645.0 * 1048576.0, "645 MiB"),
            (1e30, "909494701772928256 TiB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
        assert_eq!(rate(12.3 * 1048576.0), "12.3 MiB/s");
    }

    #[test]
    fn durations_have_the_unit_that_suits() {
        for (ms, expected) in [
            (0.0, "0 ms"),
            (0.347, "0.35 ms"),
            (12.34, "12.3 ms"),
            (300.0, "300 ms"),
            (4200.0, "4.20 s"),
            (125_000.0, "2 min 5 s"),
            (-1.0, "0 ms"),
        ] {
            assert_eq!(duration(ms), expected);
        }
        assert_eq!(known(None), "unknown");
    }
}
