//! Sizes and durations as users write them.

use std::time::Duration;

/// Bytes from `512M`, `2GiB`, `4096`: K, M, G and T are powers of 1024.
pub(super) fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("expected a size such as 512M or 2GiB: {error}"))
}

/// A duration such as `20ms` or `1s`.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text)
        .map_err(|error| format!("expected a duration such as 20ms or 1s: {error}"))
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
    fn durations() {
        assert_eq!(duration("20ms"), Ok(Duration::from_millis(20)));
        assert!(duration("20").unwrap_err().starts_with("expected a duration"));
    }
}
