//! The bare guest's command line: words of the form `key=value`; unknown words are passed over, and all that follow a
//! word `--`, as in Linux.

/// How fast memory is dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkloadRate {
    /// As fast as the CPUs can.
    Max,
    /// Bytes of dirtied pages per second, all CPUs together.
    BytesPerSecond(u64),
}

impl WorkloadRate {
    /// `max`, or bytes per second as [`size`] reads them.
    pub fn parse(value: &str) -> Option<Self> {
        match value {
            "max" => Some(Self::Max),
            value => size(value).map(Self::BytesPerSecond),
        }
    }
}

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BareSettings {
    /// Bytes that are dirtied; `None`: all usable memory.
    pub workset: Option<u64>,
    /// How fast.
    pub rate: WorkloadRate,
    /// Number of CPUs to use, this one included.
    pub cpus: u32,
    /// TSC ticks per millisecond; `None`: measured against the local APIC's timer.
    pub tsc_khz: Option<u64>,
    /// Whether memory outside the working set is stamped once as well.
    pub fill: bool,
    /// Milliseconds between two reports.
    pub tick_ms: u64,
    /// Whether a CPU with nothing due spins (finer gaps) instead of waiting for its timer.
    pub spin: bool,
    /// Pages that are read from a disk at a time; 0: there is no disk.
    pub reads: u32,
    /// Whether each of them is written before it is read.
    pub writes: bool,
    /// Whether the disk may answer with I/O errors, which are then counted apart.
    pub io_errors: bool,
}

impl Default for BareSettings {
    fn default() -> Self {
        Self {
            workset: None,
            rate: WorkloadRate::BytesPerSecond(0),
            cpus: 1,
            tsc_khz: None,
            fill: true,
            tick_ms: 50,
            spin: false,
            reads: 0,
            writes: false,
            io_errors: false,
        }
    }
}

impl BareSettings {
    /// Most CPUs that the image has stacks for.
    pub const MAX_CPUS: u32 = 32;
    /// Most reads at a time that the image has memory for.
    pub const MAX_READS: u32 = 32;

    /// Reads a command line. The error is the word that makes no sense.
    pub fn parse(line: &str) -> Result<Self, &str> {
        let mut settings = Self::default();
        for word in words(line) {
            let Some((key, value)) = word.split_once('=') else {
                continue;
            };
            settings.set(key, value).ok_or(word)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "workset" => self.workset = Some(size(value)?),
            "rate" => self.rate = WorkloadRate::parse(value)?,
            "cpus" => self.cpus = value.parse().ok().filter(|n| (1..=Self::MAX_CPUS).contains(n))?,
            "tsc_khz" => {
                self.tsc_khz = Some(
                    value
                        .parse()
                        .ok()
                        .filter(|khz| (1_000..100_000_000).contains(khz))?,
                )
            }
            "fill" => self.fill = flag(value)?,
            "tick" => self.tick_ms = value.parse().ok().filter(|ms| (1..=60_000).contains(ms))?,
            "idle" => self.spin = ["halt", "spin"].iter().position(|name| *name == value)? == 1,
            "reads" => self.reads = value.parse().ok().filter(|n| *n <= Self::MAX_READS)?,
            "writes" => self.writes = flag(value)?,
            "io_errors" => self.io_errors = flag(value)?,
            _ => {}
        }
        Some(())
    }
}

/// Physical addresses of the registers of virtio-mmio devices, as monitors name them on a command line:
/// `virtio_mmio.device=SIZE@ADDRESS:INTERRUPT`, the address in hexadecimal.
pub fn virtio_devices(line: &str) -> impl Iterator<Item = u64> {
    words(line).filter_map(|word| {
        let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once("@0x")?;
        let (address, _) = place.split_once(':')?;
        u64::from_str_radix(address, 16).ok()
    })
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split_ascii_whitespace().take_while(|word| *word != "--")
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// Bytes, with K, M or G (powers of 1024); `None` if it is no such number or too large.
pub fn size(value: &str) -> Option<u64> {
    let (digits, shift) = match value.as_bytes().last()? {
        b'K' => (&value[..value.len() - 1], 10),
        b'M' => (&value[..value.len() - 1], 20),
        b'G' => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_set_what_they_name() {
        let settings = BareSettings::parse(
            "console=ttyS0 workset=512M rate=max cpus=4 tsc_khz=2300000 fill=0 tick=20 idle=spin reads=32 writes=1 \
             io_errors=1 quiet",
        );
        let expected = BareSettings {
            workset: Some(512 << 20),
            rate: WorkloadRate::Max,
            cpus: 4,
            tsc_khz: Some(2_300_000),
            fill: false,
            tick_ms: 20,
            spin: true,
            reads: 32,
            writes: true,
            io_errors: true,
        };
        assert_eq!(settings, Ok(expected));
        assert_eq!(
            BareSettings::parse("").map(|s| s.rate),
            Ok(WorkloadRate::BytesPerSecond(0))
        );
        let behind = BareSettings::parse("rate=max -- cpus=99 rate=0").map(|s| (s.rate, s.cpus));
        assert_eq!(behind, Ok((WorkloadRate::Max, 1)));
        assert_eq!(
            BareSettings::parse("rate=100M").map(|s| s.rate),
            Ok(WorkloadRate::BytesPerSecond(100 << 20))
        );
    }

    #[test]
    fn devices_of_two_monitors() {
        let line = "virtio_mmio.device=4K@0xd0000000:5 reads=1 virtio_mmio.device=512@0xfeb00e00:12:0 \
                    virtio_mmio.device=4K virtio_mmio.device=4K@0x:5 virtio_mmio.device=4K@0xd0001000 \
                    -- virtio_mmio.device=4K@0xd0002000:6";
        assert!(virtio_devices(line).eq([0xd000_0000, 0xfeb0_0e00]));
    }

    #[test]
    fn a_word_without_sense_is_named() {
        for word in [
            "rate=fast",
            "workset=1T",
            "workset=M",
            "workset=99999999999G",
            "cpus=0",
            "cpus=33",
            "tick=0",
            "reads=33",
            "writes=2",
            "io_errors=yes",
        ] {
            assert_eq!(BareSettings::parse(word), Err(word));
        }
    }
}
