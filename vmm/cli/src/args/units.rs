//! Sizes and durations as users write them.

use std::time::Duration;

/// Bytes from `512M`, `2GiB`, `4096`: K, M, G and T are powers of 1024.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("expected a size such as 512M or 2GiB: {error}"))
}

/// Whole MiB of a size.
pub(crate) fn mebibytes(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    if bytes.is_multiple_of(1 << 20) {
        return Ok(bytes >> 20);
    }
    Err(format!("expected whole MiB, got {bytes} bytes"))
}

/// A duration such as `20ms` or `1s`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a duration such as 20ms or 1s: {error}"))
}

/// A duration that is not zero.
pub(crate) fn some_duration(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("expected a duration above 0".into()),
        some => Ok(some),
    }
}

/// Bytes per second from `500MB/s`, `1GiB/s`: KB, MB, GB and TB are powers of 1000 as on data sheets of networks;
/// KiB and K, MiB and M and so on are powers of 1024.
pub(crate) fn rate(text: &str) -> Result<u64, String> {
    let shown = || format!("expected a rate such as 500MB/s or 1GiB/s, got {text:?}");
    let size = text.strip_suffix("/s").ok_or_else(shown)?;
    let of_thousands = size.ends_with(['B', 'b']) && !size.ends_with("iB") && !size.ends_with("ib");
    let config = parse_size::Config::new();
    let config = if of_thousands {
        config.with_decimal()
    } else {
        config.with_binary()
    };
    match config.parse_size(size) {
        Ok(0) => Err("expected a rate above 0; leave the option out for no limit".into()),
        Ok(rate) => Ok(rate),
        Err(error) => Err(format!("{}: {error}", shown())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("4096"), Ok(4096));
        assert!(size("lots").unwrap_err().starts_with("expected a size"));
        assert!(size("-1M").is_err());
    }

    #[test]
    fn rates_have_both_kinds_of_units() {
        assert_eq!(rate("500MB/s"), Ok(500_000_000));
        assert_eq!(rate("1GiB/s"), Ok(1 << 30));
        assert_eq!(rate("1.5 KiB/s"), Ok(1536));
        assert_eq!(rate("2M/s"), Ok(2 << 20));
        assert_eq!(rate("1000B/s"), Ok(1000));
        for bad in ["500MB", "fast", "MB/s", "-1MB/s", "1MB/min", "/s"] {
            assert!(
                rate(bad).unwrap_err().starts_with("expected a rate such as"),
                "{bad}"
            );
        }
        assert!(rate("0MB/s").unwrap_err().contains("above 0"));
    }

    #[test]
    fn durations() {
        assert!(some_duration("0ms").unwrap_err().contains("above 0"));
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert!(duration("20").unwrap_err().starts_with("expected a duration"));
    }
}
