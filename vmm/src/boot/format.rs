//! What kind of kernel a file is, and how long it must be to be whole.

/// Bytes from the start of a file that [`recognise`] needs: the ELF header with its program headers, which
/// linkers put right behind it, or the setup header of a bzImage.
pub(super) const HEAD_LEN: u64 = 4096;

/// A kernel's file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelFormat {
    Elf,
    BzImage,
}

/// The format and the least size of a whole file that begins with `head`; `None` if it is neither.
pub(super) fn recognise(head: &[u8]) -> Option<(KernelFormat, u64)> {
    if head.starts_with(b"\x7fELF") {
        return Some((KernelFormat::Elf, elf_size(head)));
    }
    // Boot protocol (Documentation/arch/x86/boot.rst): magic at 0x202.
    (head.get(0x202..0x206) == Some(b"HdrS".as_slice())).then(|| (KernelFormat::BzImage, bzimage_size(head)))
}

/// The end of the last segment that the program headers place in the file. Of a file that is too short to have all
/// program headers it is at least their end, which the file does not reach.
fn elf_size(head: &[u8]) -> u64 {
    const HEADER: u64 = 64;
    let (Some(table), Some(entry_len), Some(count)) = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56))
    else {
        return HEADER;
    };
    let mut end = table.saturating_add(u64::from(entry_len) * u64::from(count));
    for index in 0..u64::from(count) {
        let Ok(entry) = usize::try_from(table.saturating_add(index * u64::from(entry_len))) else {
            break;
        };
        let (Some(offset), Some(len)) = (
            u64_at(head, entry.saturating_add(8)),
            u64_at(head, entry.saturating_add(32)),
        ) else {
            break;
        };
        end = end.max(offset.saturating_add(len));
    }
    end
}

/// `setup_sects` at 0x1f1 (0 means 4), `syssize` in 16-byte units at 0x1f4.
fn bzimage_size(head: &[u8]) -> u64 {
    let sectors = match head.get(0x1f1) {
        Some(0) | None => 4,
        Some(sectors) => u64::from(*sectors),
    };
    let paragraphs = [0x1f4, 0x1f6].map(|at| u64::from(u16_at(head, at).unwrap_or(0)));
    (sectors + 1) * 512 + (paragraphs[0] | paragraphs[1] << 16) * 16
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elf_sizes_come_from_the_program_headers() {
        let mut head = vec![0; 64 + 56];
        head[..4].copy_from_slice(b"\x7fELF");
        head[32..40].copy_from_slice(&64u64.to_le_bytes());
        head[54..56].copy_from_slice(&56u16.to_le_bytes());
        head[56..58].copy_from_slice(&1u16.to_le_bytes());
        assert_eq!(recognise(&head), Some((KernelFormat::Elf, 120)));
        head[64 + 8..64 + 16].copy_from_slice(&4096u64.to_le_bytes());
        head[64 + 32..64 + 40].copy_from_slice(&100u64.to_le_bytes());
        assert_eq!(recognise(&head), Some((KernelFormat::Elf, 4196)));
        head[64 + 8..64 + 16].fill(0xff);
        assert_eq!(recognise(&head), Some((KernelFormat::Elf, u64::MAX)));
    }

    #[test]
    fn bzimage_sizes_come_from_the_setup_header() {
        let mut head = vec![0; 0x206];
        head[0x202..].copy_from_slice(b"HdrS");
        head[0x1f1] = 2;
        head[0x1f4] = 3;
        assert_eq!(recognise(&head), Some((KernelFormat::BzImage, 3 * 512 + 48)));
    }

    #[test]
    fn anything_else_is_neither() {
        for bytes in [&b""[..], b"\x7fEL", &[0; 4096]] {
            assert_eq!(recognise(bytes), None);
        }
        for len in 4..64 {
            recognise(&[b"\x7fELF".as_slice(), &vec![0xff; len - 4]].concat());
        }
    }
}
