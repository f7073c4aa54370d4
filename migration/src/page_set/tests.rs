//! Sets of pages against a model, and their limits.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const HIGH: u64 = 1 << 32;

/// 70 pages at 0 and 130 at 4 GiB.
fn set() -> PageSet {
    let regions = [
        MemoryRegion {
            gpa: 0,
            len: 70 * PAGE_SIZE,
        },
        MemoryRegion {
            gpa: HIGH,
            len: 130 * PAGE_SIZE,
        },
    ];
    PageSet::new(&regions).unwrap()
}

fn range(gpa: u64, len: u64) -> MemoryRange {
    MemoryRange { gpa, len }
}

#[test]
fn all_pages_are_two_ranges_or_as_many_as_the_cap_makes() {
    let mut pages = set();
    assert!(pages.is_empty() && pages.ranges(1 << 20).next().is_none());
    pages.insert_all();
    assert_eq!(pages.len(), 200);
    let whole: Vec<_> = pages.ranges(u64::MAX).collect();
    assert_eq!(whole, [range(0, 70 << 12), range(HIGH, 130 << 12)]);
    assert_eq!(pages.ranges(0).count(), 200);
    assert_eq!(pages.ranges(64 << 12).count(), 2 + 3);
    let taken = pages.take();
    assert_eq!((pages.len(), taken.len()), (0, 200));
    pages.union(&taken).unwrap();
    assert_eq!(pages, taken);
    let mut less = PageSet::new(&[MemoryRegion {
        gpa: 0,
        len: 70 * PAGE_SIZE,
    }])
    .unwrap();
    less.insert_range(range(65 << 12, 4 << 12)).unwrap();
    pages.subtract(&less);
    assert_eq!(pages.len(), 196);
    assert!(pages.contains(64 << 12) && !pages.contains(65 << 12) && pages.contains(69 << 12));
    less.subtract(&taken);
    assert!(less.is_empty());
}

#[test]
fn what_is_out_of_range_is_refused() {
    let mut pages = set();
    for bad in [
        range(70 << 12, 1),
        range(69 << 12, 8192),
        range(HIGH - 1, 1),
        range(u64::MAX, 2),
        range(0, 0),
    ] {
        let expected = PageSetError::OutOfRange {
            gpa: bad.gpa,
            len: bad.len,
        };
        assert_eq!(pages.insert_range(bad), Err(expected));
    }
    assert!(pages.insert_gpa(u64::MAX).is_err() && !pages.contains(u64::MAX));
    assert!(matches!(
        pages.insert_bitmap(2, &[]),
        Err(PageSetError::NoRegion { index: 2, count: 2 })
    ));
    assert!(matches!(
        pages.insert_bitmap(0, &[0]),
        Err(PageSetError::Bitmap {
            expected: 2,
            got: 1,
            ..
        })
    ));
    assert!(matches!(
        pages.insert_bitmap(0, &[0, 1 << 6]),
        Err(PageSetError::Bitmap { stray: true, .. })
    ));
    assert!(pages.is_empty());
    assert_eq!(
        PageSet::new(&[]).unwrap().union(&pages),
        Err(PageSetError::OtherRegions)
    );
    pages.union(&PageSet::new(&[]).unwrap()).unwrap();
}

#[test]
fn words_past_the_end_are_zero() {
    // 513 words, two leaves.
    let region = MemoryRegion {
        gpa: 0,
        len: 513 * 64 * PAGE_SIZE,
    };
    let mut pages = PageSet::new(&[region]).unwrap();
    pages.insert_all();
    assert_eq!(pages.words(0, 512, 3), [u64::MAX, 0, 0]);
    assert_eq!(pages.words(0, 600, 1), [0]);
    assert_eq!(pages.words(1, 0, 1), [0]);
    assert_eq!(pages.len(), 513 * 64);
    pages.invert();
    assert!(pages.is_empty());
}

#[test]
fn regions_are_checked() {
    for (gpa, len) in [(1, 4096), (0, 4095), (0, 0), (u64::MAX - 4095, 8192)] {
        let error = PageSet::new(&[MemoryRegion { gpa, len }]).unwrap_err();
        assert_eq!(error, PageSetError::Region { gpa, len });
    }
    let overlap = [
        MemoryRegion { gpa: 0, len: 8192 },
        MemoryRegion { gpa: 4096, len: 4096 },
    ];
    assert!(PageSet::new(&overlap).is_err());
}

proptest! {
    #[test]
    fn a_set_holds_what_was_put_in(
        ranges in proptest::collection::vec((0u64..130, 1u64..40, any::<bool>()), 0..12),
        bitmap in any::<[u64; 2]>(),
        cap in 1u64..80,
    ) {
        let (mut pages, mut model) = (set(), BTreeSet::new());
        for (first, count, high) in ranges {
            let gpa = if high { HIGH } else { 0 } + first * PAGE_SIZE;
            if pages.insert_range(range(gpa, count * PAGE_SIZE)).is_ok() {
                model.extend((0..count).map(|page| gpa + page * PAGE_SIZE));
            }
        }
        let bitmap = [bitmap[0], bitmap[1] & 0x3f];
        pages.insert_bitmap(0, &bitmap).unwrap();
        let in_bitmap = |page: &u64| bitmap[(page / 64) as usize] >> (page % 64) & 1 == 1;
        model.extend((0u64..70).filter(in_bitmap).map(|page| page * PAGE_SIZE));
        prop_assert_eq!(pages.len(), model.len() as u64);
        prop_assert!(model.iter().all(|gpa| pages.contains(gpa + 5)));
        let ranges: Vec<_> = pages.ranges(cap * PAGE_SIZE).collect();
        prop_assert!(ranges.iter().all(|range| range.pages() <= cap));
        let gpas: Vec<u64> =
            ranges.iter().flat_map(|r| (r.gpa..r.gpa + r.len).step_by(4096)).collect();
        prop_assert_eq!(gpas, model.into_iter().collect::<Vec<_>>());
    }

    /// Over three leaves and a bit, where whole leaves come and go.
    #[test]
    fn large_sets_are_what_small_steps_make_of_them(
        steps in proptest::collection::vec((0u8..6, 0u64..100_000, 1u64..70_000), 1..10),
        from in 0u64..110_000,
        left in 0u64..110_000,
    ) {
        const PAGES: u64 = 3 * 32768 + 100;
        let region = [MemoryRegion { gpa: HIGH, len: PAGES * PAGE_SIZE }];
        let mut pages = PageSet::new(&region).unwrap();
        let mut model = vec![false; PAGES as usize];
        for (step, first, count) in steps {
            let end = (first + count).min(PAGES);
            let mut other = PageSet::new(&region).unwrap();
            if first < end {
                other.insert_range(range(HIGH + first * PAGE_SIZE, (end - first) * PAGE_SIZE)).unwrap();
            }
            let touched = &mut model[first.min(end) as usize..end as usize];
            match step {
                0 => {
                    pages.union(&other).unwrap();
                    touched.fill(true);
                }
                1 => {
                    pages.subtract(&other);
                    touched.fill(false);
                }
                2 => {
                    pages.invert();
                    model.iter_mut().for_each(|page| *page = !*page);
                }
                3 => {
                    let bitmap = other.words(0, 0, PAGES.div_ceil(64) as usize);
                    pages.insert_bitmap(0, &bitmap).unwrap();
                    touched.fill(true);
                }
                4 => {
                    let new = touched.iter().all(|page| !page);
                    let range = range(HIGH + first.min(end - 1) * PAGE_SIZE, (end - first.min(end - 1)) * PAGE_SIZE);
                    if first < end {
                        prop_assert_eq!(pages.insert_new(range), Ok(new));
                        touched.iter_mut().for_each(|page| *page |= new);
                    }
                }
                _ => {
                    pages.insert_part(&other, 0, (first / 64) as usize, (end.saturating_sub(first) / 64) as usize);
                    let words = first / 64..first / 64 + end.saturating_sub(first) / 64;
                    let part = words.start * 64..words.end * 64;
                    for (page, there) in (0..).zip(&mut model) {
                        *there |= part.contains(&page) && (first..end).contains(&page);
                    }
                }
            }
        }
        let in_model: Vec<u64> = (0..PAGES).filter(|page| model[*page as usize]).collect();
        prop_assert_eq!(pages.len(), in_model.len() as u64);
        prop_assert_eq!(pages.is_empty(), in_model.is_empty());
        let listed: Vec<u64> = pages
            .ranges(u64::MAX)
            .flat_map(|range| (range.gpa..range.gpa + range.len).step_by(4096))
            .map(|gpa| (gpa - HIGH) / PAGE_SIZE)
            .collect();
        prop_assert_eq!(&listed, &in_model);
        let from = from.min(PAGES - 1);
        prop_assert_eq!(pages.contains(HIGH + from * PAGE_SIZE), model[from as usize]);
        let by_parts: u32 = pages.filled().flat_map(|(_, _, words)| words).map(|word| word.count_ones()).sum();
        prop_assert_eq!(u64::from(by_parts), pages.len());

        let (all, before) = (pages.clone(), pages.len());
        let first = pages.split_off(left);
        prop_assert!(first.len() >= left.min(before) && first.len() < left + 64);
        prop_assert_eq!(first.len() + pages.len(), before);
        let last = first.ranges(u64::MAX).last().map_or(0, |last| last.gpa + last.len);
        let next = pages.ranges(u64::MAX).next().map_or(u64::MAX, |next| next.gpa);
        prop_assert!(last <= next);
        pages.union(&first).unwrap();
        prop_assert_eq!(pages, all);
    }
}

#[test]
fn a_terabyte_with_few_pages_in_a_set_or_few_out_of_it_is_little_work() {
    let region = MemoryRegion { gpa: 0, len: 1 << 40 };
    let began = std::time::Instant::now();
    let mut pages = PageSet::new(&[region]).unwrap();
    pages.insert_gpa(1 << 39).unwrap();
    let mut others = pages.clone();
    for _ in 0..10 {
        others.invert();
        others.union(&pages).unwrap();
        assert_eq!(others.len(), 1 << 28);
        others.subtract(&pages);
        assert_eq!(others.len(), (1 << 28) - 1);
        assert_eq!(others.ranges(u64::MAX).count(), 2);
        others.invert();
        assert_eq!(others, pages);
    }
    // Bitmaps of 32 MiB each would take seconds for this.
    assert!(
        began.elapsed() < std::time::Duration::from_millis(200),
        "{:?}",
        began.elapsed()
    );
}
