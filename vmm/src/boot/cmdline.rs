//! The kernel's command line: what the machine adds to it, and how it gets into the guest.

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, VirtioMmioSlot, layout};

/// The command line with the words `added` where the kernel reads them: at the end, but before a `--`, behind which all
/// is for the guest's first program.
pub fn with_words(cmdline: &str, added: &str) -> String {
    let (kernel, init) = cmdline.split_at(kernel_len(cmdline));
    let parts = [kernel.trim(), added.trim(), init.trim()];
    parts
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Whether the kernel finds a value for `key` in the command line.
pub fn has_key(cmdline: &str, key: &str) -> bool {
    let kernel = &cmdline[..kernel_len(cmdline)];
    kernel
        .split_ascii_whitespace()
        .any(|word| word.strip_prefix(key).is_some_and(|rest| rest.starts_with('=')))
}

/// The bytes of the command line that are the kernel's: those before the first word `--`. Words end as in Linux's
/// `next_arg` (lib/cmdline.c): at white space outside quotes; quotes around a whole word are not part of it.
fn kernel_len(cmdline: &str) -> usize {
    let bytes = cmdline.as_bytes();
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|byte| !is_space(*byte)) {
        let start = at + start;
        let mut quoted = false;
        let len = bytes[start..].iter().position(|byte| {
            quoted ^= *byte == b'"';
            is_space(*byte) && !quoted
        });
        let end = len.map_or(bytes.len(), |len| start + len);
        let word = &bytes[start..end];
        let word = word
            .strip_prefix(b"\"")
            .map_or(word, |word| word.strip_suffix(b"\"").unwrap_or(word));
        if word == b"--" {
            return start;
        }
        at = end;
    }
    bytes.len()
}

/// The kernel's `isspace`, which knows Latin-1's no-break space as well.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r' | 0xa0)
}

/// The command line with a `virtio_mmio.device=` word for each device.
pub(super) fn with_devices(cmdline: &str, slots: &[VirtioMmioSlot]) -> String {
    let word = |slot: &VirtioMmioSlot| format!("virtio_mmio.device=4K@{:#x}:{}", slot.base, slot.gsi);
    let words: Vec<_> = slots.iter().map(word).collect();
    with_words(cmdline, &words.join(" "))
}

/// Puts the command line where both boot protocols say that it is.
pub(super) fn write(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    let limit = layout::CMDLINE_MAX - 1;
    if cmdline.len() > limit {
        return Err(BootError::CmdlineTooLong {
            got: cmdline.len(),
            limit,
        });
    }
    if let Some(position) = cmdline.bytes().position(|byte| byte == 0) {
        return Err(BootError::CmdlineNul(position));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_for_init_stays_behind() {
        for (before, after) in [
            ("", "x"),
            ("quiet", "quiet x"),
            (" quiet  ro ", "quiet  ro x"),
            (
                "init=/bin/cat -- /etc/hostname",
                "init=/bin/cat x -- /etc/hostname",
            ),
            ("a -- b -- c", "a x -- b -- c"),
            ("-- b", "x -- b"),
            ("a\t--\nb", "a x --\nb"),
            ("a --", "a x --"),
            ("a \"--\" b", "a x \"--\" b"),
            ("a \"--", "a x \"--"),
            // No word of their own.
            ("foo --bar", "foo --bar x"),
            ("a-- b", "a-- b x"),
            ("a --- b", "a --- b x"),
            ("a=\"b -- c\" d", "a=\"b -- c\" d x"),
            ("\"a -- b\" c", "\"a -- b\" c x"),
            ("--=b c", "--=b c x"),
            ("\u{e4} -- b", "\u{e4} x -- b"),
            // The second byte of this letter is white space to the kernel.
            ("\u{e0}-- b", "\u{e0} x -- b"),
        ] {
            assert_eq!(with_words(before, "x"), after, "{before:?}");
        }
        assert_eq!(with_words(" a -- b", ""), "a -- b");
    }

    #[test]
    fn devices_are_the_kernels() {
        let slots = [(0xd000_0000, 16), (0xd000_1000, 17)].map(|(base, gsi)| VirtioMmioSlot { base, gsi });
        assert_eq!(
            with_devices("quiet -- one", &slots),
            "quiet virtio_mmio.device=4K@0xd0000000:16 virtio_mmio.device=4K@0xd0001000:17 -- one"
        );
        assert_eq!(with_devices("quiet", &[]), "quiet");
    }

    #[test]
    fn keys_are_looked_for_where_the_kernel_does() {
        assert!(has_key("quiet root=/dev/vda1 rw", "root"));
        for without in ["quiet", "-- root=/dev/vda", "xroot=/dev/vda", "rootwait", "root"] {
            assert!(!has_key(without, "root"), "{without}");
        }
    }
}
