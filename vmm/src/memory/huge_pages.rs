//! Huge pages that the host has set aside (hugetlbfs).

use std::io;
use std::path::Path;

use super::MemoryError;

/// Bytes of a huge page: the size that every x86-64 processor has.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// What the kernel knows about pages of that size (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Checks that memory of `size` bytes can be had in huge pages, before it is asked for.
pub(super) fn check_huge_pages(size: u64) -> Result<(), MemoryError> {
    if !size.is_multiple_of(HUGE_PAGE) {
        return Err(MemoryError::NotHugePages(size));
    }
    let needed = size / HUGE_PAGE;
    let free = free_pages(Path::new(POOL)).map_err(MemoryError::HugePagePool)?;
    if free < needed {
        let missing = needed - free;
        return Err(MemoryError::TooFewHugePages {
            needed,
            free,
            missing,
        });
    }
    Ok(())
}

/// Huge pages that are neither used nor reserved, including those that the kernel may make on demand.
fn free_pages(pool: &Path) -> io::Result<u64> {
    let count = |name: &str| -> io::Result<u64> {
        let text = std::fs::read_to_string(pool.join(name))?;
        text.trim()
            .parse()
            .map_err(|_| io::Error::other(format!("{name}: expected a number, got {text:?}")))
    };
    let free = count("free_hugepages")?.saturating_sub(count("resv_hugepages")?);
    let on_demand = count("nr_overcommit_hugepages")?.saturating_sub(count("surplus_hugepages")?);
    Ok(free + on_demand)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_promised_are_not_free() {
        let pool = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(pool.path().join(name), text).unwrap();
        write("free_hugepages", "9\n");
        write("resv_hugepages", "4\n");
        write("nr_overcommit_hugepages", "3\n");
        write("surplus_hugepages", "1\n");
        assert_eq!(free_pages(pool.path()).unwrap(), 7);
        write("surplus_hugepages", "5\n");
        assert_eq!(free_pages(pool.path()).unwrap(), 5);
        write("free_hugepages", "many");
        assert!(
            free_pages(pool.path())
                .unwrap_err()
                .to_string()
                .contains("got \"many\"")
        );
    }

    #[test]
    fn parts_of_huge_pages_and_more_than_there_are_cannot_be_had() {
        let refused = |size| check_huge_pages(size).unwrap_err().to_string();
        assert!(refused(HUGE_PAGE + 4096).contains("expected a multiple of 2097152 bytes, got 2101248"));
        assert!(refused(1 << 60).contains("/proc/sys/vm/nr_hugepages"));
    }
}
