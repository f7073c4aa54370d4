//! The addresses of everything that moves as pages: guest RAM, and beyond it the disks that come along.

use migration_io::PAGE_SIZE;

use crate::page_set::PageSetError;
use crate::ports::MemoryRegion;

/// Where the first disk begins: beyond every guest-physical address (52 bits at most; Intel SDM vol. 3A, 4.1.4).
const DISKS: u64 = 1 << 52;

/// Whether an address is on a disk.
pub(crate) fn is_disk(gpa: u64) -> bool {
    gpa >= DISKS
}

/// The regions of disks of these sizes in bytes, one behind the other. A disk's last page may reach beyond its end.
pub(crate) fn disk_regions(lens: impl IntoIterator<Item = u64>) -> Result<Vec<MemoryRegion>, PageSetError> {
    let mut gpa = DISKS;
    let region = |len: u64| {
        let outside = PageSetError::Region { gpa, len };
        let Some(len) = len.checked_next_multiple_of(PAGE_SIZE).filter(|len| *len > 0) else {
            return Err(outside);
        };
        let region = MemoryRegion { gpa, len };
        gpa = gpa.checked_add(len).ok_or(outside)?;
        Ok(region)
    };
    lens.into_iter().map(region).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_lie_one_behind_the_other() {
        let regions = disk_regions([512, 4096, 4097]).unwrap();
        let expected = [(0, 4096), (4096, 4096), (8192, 8192)];
        let expected = expected.map(|(at, len)| MemoryRegion { gpa: DISKS + at, len });
        assert_eq!(regions, expected);
        for lens in [
            vec![0],
            vec![u64::MAX],
            vec![u64::MAX - DISKS],
            vec![1 << 63, 1 << 63],
        ] {
            assert!(disk_regions(lens.clone()).is_err(), "{lens:?}");
        }
    }
}
