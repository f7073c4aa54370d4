//! What the kernel's command line says to the agent.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use guest_core::{PAGE, WorkloadRate, size};

/// The words `godwit.<key>=<value>`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct AgentSettings {
    /// `dirty`: bytes of memory to work on.
    pub(crate) dirty_bytes: u64,
    /// `base`: the physical address where that memory is, beyond what the kernel was left; `None`: anywhere.
    pub(crate) base: Option<u64>,
    /// `rate`: bytes of dirtied pages per second.
    pub(crate) rate: WorkloadRate,
    /// `tick`: time between two heartbeats.
    pub(crate) tick: Duration,
    /// `print`: time between two heartbeats that are printed, or a little more.
    pub(crate) print: Duration,
    /// `disk`: a device with an ext4 file system to work on.
    pub(crate) disk: Option<String>,
    /// `address`: the network card's, with the length of its prefix.
    pub(crate) address: Option<(Ipv4Addr, u8)>,
    /// `echo`: the address of a server that sends back everything that it gets.
    pub(crate) echo: Option<SocketAddr>,
    /// `random`: a device to read random numbers from.
    pub(crate) random: Option<String>,
    /// Words with the agent's prefix that make no sense.
    pub(crate) unknown: Vec<String>,
}

impl AgentSettings {
    /// Reads a command line; words without the agent's prefix are passed over.
    pub(crate) fn parse(line: &str) -> Self {
        let mut settings = Self {
            dirty_bytes: 0,
            base: None,
            rate: WorkloadRate::BytesPerSecond(0),
            tick: Duration::from_millis(50),
            print: Duration::from_millis(250),
            disk: None,
            address: None,
            echo: None,
            random: None,
            unknown: Vec::new(),
        };
        for word in line.split_ascii_whitespace() {
            let Some(ours) = word.strip_prefix("godwit.") else {
                continue;
            };
            if ours
                .split_once('=')
                .and_then(|(key, value)| settings.set(key, value))
                .is_none()
            {
                settings.unknown.push(word.to_owned());
            }
        }
        settings
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "dirty" => self.dirty_bytes = size(value)?,
            "base" => self.base = Some(size(value).filter(|base| base % PAGE == 0)?),
            "rate" => self.rate = WorkloadRate::parse(value)?,
            "tick" => self.tick = milliseconds(value)?,
            "print" => self.print = milliseconds(value)?,
            "disk" => self.disk = Some(value.to_owned()),
            "address" => {
                let (address, prefix) = value.split_once('/')?;
                self.address = Some((address.parse().ok()?, prefix.parse().ok()?));
            }
            "echo" => self.echo = Some(value.parse().ok()?),
            "random" => self.random = Some(value.to_owned()),
            _ => return None,
        }
        Some(())
    }
}

fn milliseconds(value: &str) -> Option<Duration> {
    let number: u64 = value.strip_suffix("ms").unwrap_or(value).parse().ok()?;
    (1..=60_000)
        .contains(&number)
        .then(|| Duration::from_millis(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_words_are_read_and_nonsense_is_kept() {
        let line = "console=ttyS0 godwit.dirty=64M godwit.base=96M godwit.rate=max quiet godwit.tick=20ms godwit.print=1000ms godwit.disk=/dev/vda godwit.address=10.0.0.9/24 godwit.echo=10.0.0.1:7 godwit.random=/dev/hwrng godwit.x=1";
        let expected = AgentSettings {
            dirty_bytes: 64 << 20,
            base: Some(96 << 20),
            rate: WorkloadRate::Max,
            tick: Duration::from_millis(20),
            print: Duration::from_millis(1000),
            disk: Some("/dev/vda".into()),
            address: Some((Ipv4Addr::new(10, 0, 0, 9), 24)),
            echo: Some("10.0.0.1:7".parse().unwrap()),
            random: Some("/dev/hwrng".into()),
            unknown: vec!["godwit.x=1".into()],
        };
        assert_eq!(AgentSettings::parse(line), expected);
        assert_eq!(
            AgentSettings::parse(
                "godwit.tick=0ms godwit.print=0 godwit.dirty godwit.rate=quick godwit.base=5"
            )
            .unknown
            .len(),
            5
        );
    }
}
