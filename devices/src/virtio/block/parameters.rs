//! What a disk is made with, besides its backend.

use std::str::FromStr;

use crate::rate::Limits;

/// When a write counts as done, for a guest that can flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// When the host has it in its cache; a flush makes it durable. The guest may change that.
    #[default]
    Writeback,
    /// When it is durable, until the guest changes that.
    Writethrough,
    /// When the host has it in its cache; the guest's flushes do nothing. For disks that are not needed after a crash
    /// of the host.
    Unsafe,
}

/// Not the name of a [`CacheMode`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cache: expected writeback, writethrough or unsafe, got {0:?}")]
pub struct CacheModeError(String);

impl FromStr for CacheMode {
    type Err = CacheModeError;

    fn from_str(text: &str) -> Result<Self, CacheModeError> {
        match text {
            "writeback" => Ok(Self::Writeback),
            "writethrough" => Ok(Self::Writethrough),
            "unsafe" => Ok(Self::Unsafe),
            _ => Err(CacheModeError(text.into())),
        }
    }
}

/// How the requests of a disk are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// io_uring, if the host lets the process use it.
    #[default]
    Async,
    /// System calls, one by one, on the disk's helper thread.
    Sync,
}

/// How a disk serves its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockParameters {
    /// Its rate limits.
    pub limits: Limits,
    /// When writes are done.
    pub cache: CacheMode,
    /// Whether the host's cache is bypassed (O_DIRECT).
    pub direct: bool,
    /// How requests are carried out. Each host chooses it, so it is not sent to a destination.
    pub engine: IoEngine,
}

impl BlockParameters {
    /// The parameters that a destination must know; no bytes if they are the default.
    pub fn to_bytes(&self) -> Vec<u8> {
        let usual = Self {
            engine: self.engine,
            ..Self::default()
        };
        if *self == usual {
            return Vec::new();
        }
        let mut bytes = vec![self.cache as u8, self.direct.into()];
        bytes.extend(self.limits.to_bytes());
        bytes
    }

    /// Parses what [`BlockParameters::to_bytes`] made; `None` if the bytes are malformed.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (cache, direct, limits) = match bytes {
            [] => return Some(Self::default()),
            [cache, direct @ 0..=1, limits @ ..] => (cache, *direct == 1, limits),
            _ => return None,
        };
        let known = [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe];
        Some(Self {
            limits: Limits::from_bytes(limits)?,
            cache: known.into_iter().find(|known| *known as u8 == *cache)?,
            direct,
            engine: IoEngine::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate::Bucket;

    #[test]
    fn parameters_as_bytes() {
        let limits = Limits {
            bandwidth: Some(Bucket::per_second(7)),
            ..Default::default()
        };
        assert!(BlockParameters::default().to_bytes().is_empty());
        for cache in [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Unsafe] {
            for direct in [false, true] {
                for limits in [limits, Limits::default()] {
                    let parameters = BlockParameters {
                        limits,
                        cache,
                        direct,
                        ..Default::default()
                    };
                    assert_eq!(
                        BlockParameters::from_bytes(&parameters.to_bytes()),
                        Some(parameters)
                    );
                }
            }
        }
        for nonsense in [&[0][..], &[3, 0], &[0, 2], &[0, 1, 0]] {
            assert_eq!(BlockParameters::from_bytes(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn names_of_modes() {
        assert_eq!("writethrough".parse(), Ok(CacheMode::Writethrough));
        let error = "none".parse::<CacheMode>().unwrap_err().to_string();
        assert!(
            error.contains("expected writeback, writethrough or unsafe, got \"none\""),
            "{error}"
        );
    }
}
