//! What the process need not keep of itself while a guest runs.
#![allow(unsafe_code)] // Advice on mappings takes raw addresses.

use std::ops::Range;

use rustix::mm::{Advice, madvise};

/// Releases the mapped pages of the program's text: most of it was needed for the start alone. What is needed again
/// comes from the page cache.
pub fn release_text() {
    let maps = std::fs::read_to_string("/proc/self/maps");
    let program = std::fs::read_link("/proc/self/exe");
    let (Ok(maps), Ok(program)) = (maps, program) else {
        return;
    };
    for range in text(&maps, &program.to_string_lossy()) {
        // SAFETY: a private mapping of this program's file that is not writable, and never was: text, and what
        // lies before it in the file. Its pages are the file's and come back as they are when they are touched.
        let advised = unsafe { madvise(range.start as *mut _, range.len(), Advice::LinuxDontNeed) };
        if let Err(error) = advised {
            tracing::debug!(%error, "program text stays mapped");
        }
    }
}

/// The program's text, and the constants at the start of its file, among the mappings of proc_pid_maps(5). Other
/// read-only parts were written to once, when addresses were put in.
fn text(maps: &str, program: &str) -> Vec<Range<usize>> {
    let range = |line: &str| {
        let mut fields = line.split_whitespace();
        let (addresses, access, offset) = (fields.next()?, fields.next()?, fields.next()?);
        let is_program = line.ends_with(&format!(" {program}"));
        let is_text = access == "r-xp" || (access == "r--p" && offset.bytes().all(|digit| digit == b'0'));
        let (start, end) = addresses.split_once('-').filter(|_| is_program && is_text)?;
        let number = |digits| usize::from_str_radix(digits, 16).ok();
        Some(number(start)?..number(end)?)
    };
    maps.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_written_is_text() {
        let maps = "\
7f00-7f10 r--p 00000000 fe:00 12 /bin/godwit
7f10-7f30 r-xp 00010000 fe:00 12 /bin/godwit
7f30-7f40 r--p 00030000 fe:00 12 /bin/godwit
7f40-7f50 rw-p 00040000 fe:00 12 /bin/godwit
7f50-7f60 rw-p 00000000 00:00 0
7f60-7f70 r-xp 00000000 00:00 0 [vdso]
7f70-7f80 r-xp 00000000 fe:00 13 /bin/not-godwit
";
        assert_eq!(text(maps, "/bin/godwit"), [0x7f00..0x7f10, 0x7f10..0x7f30]);
    }

    #[test]
    fn the_program_goes_on_without_its_text() {
        release_text();
        assert_eq!("still here".len(), 10);
    }
}
