//! Kernels of no content, in memory that is large enough or not.

use linux_loader::loader::bootparam::setup_header;
use migration::MemoryKind;
use vm_memory::ByteValued;

use super::*;

const MIB: u64 = 1 << 20;

/// What Debian's kernel 6.1 says: it unpacks itself into 51.5 MiB from 16 MiB on.
fn header() -> setup_header {
    setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: 0x5372_6448,
        version: 0x20f,
        loadflags: 1,
        code32_start: layout::HIGH_MEMORY as u32,
        kernel_alignment: 0x20_0000,
        relocatable_kernel: 1,
        xloadflags: linux::XLF_KERNEL_64,
        initrd_addr_max: 0x7fff_ffff,
        pref_address: 0x100_0000,
        init_size: 0x337_7000,
        ..Default::default()
    }
}

/// Loads a bzImage with that header and as much of an initrd into a machine of that size.
fn load_bzimage(header: &setup_header, memory: u64, initrd: Option<u64>) -> Result<GuestMemory, BootError> {
    let directory = tempfile::tempdir().unwrap();
    let source = BootSource {
        kernel: directory.path().join("kernel"),
        initrd: initrd.map(|_| directory.path().join("initrd")),
        cmdline: String::new(),
    };
    let mut image = vec![0; 2 * 512 + 4096];
    image[0x1f1..][..size_of::<setup_header>()].copy_from_slice(header.as_slice());
    std::fs::write(&source.kernel, image).unwrap();
    if let (Some(path), Some(len)) = (&source.initrd, initrd) {
        File::create(path).unwrap().set_len(len).unwrap();
    }
    let memory = crate::memory::create(&layout::ram_ranges(memory), MemoryKind::Anonymous).unwrap();
    load(&memory, &source, 1, &[]).map(|_| memory)
}

#[test]
fn an_initrd_lies_above_what_the_kernel_unpacks_itself_into() {
    let end = 0x100_0000 + 0x337_7000;
    for fits in [16 * MIB, 96 * MIB - end] {
        let memory = load_bzimage(&header(), 96 * MIB, Some(fits)).unwrap();
        let at = GuestAddress(layout::ZERO_PAGE + 0x218);
        assert_eq!(u64::from(memory.read_obj::<u32>(at).unwrap()), 96 * MIB - fits);
    }
    for too_large in [96 * MIB - end + 1, 30 * MIB] {
        let error = load_bzimage(&header(), 96 * MIB, Some(too_large)).unwrap_err();
        assert!(
            matches!(error, BootError::InitrdTooLarge { kernel_end, .. } if kernel_end == end),
            "{error}"
        );
    }
}

#[test]
fn a_kernel_has_room_to_unpack_itself() {
    load_bzimage(&header(), 68 * MIB, None).unwrap();
    let error = load_bzimage(&header(), 64 * MIB, None).unwrap_err();
    assert!(
        matches!(error, BootError::KernelTooLarge { end: 0x437_7000, .. }),
        "{error}"
    );
    let anywhere = setup_header {
        pref_address: 0,
        ..header()
    };
    // Loaded at 1 MiB, it begins at the next address that is aligned.
    load_bzimage(&anywhere, 54 * MIB, None).unwrap();
    load_bzimage(&anywhere, 53 * MIB, None).unwrap_err();
    let fixed = setup_header {
        pref_address: 0x20_0000,
        relocatable_kernel: 0,
        ..header()
    };
    load_bzimage(&fixed, 54 * MIB, None).unwrap();
}

#[test]
fn headers_of_nonsense_are_refused() {
    for (pref_address, kernel_alignment) in [(u64::MAX, 1), (1, u32::MAX), (u64::MAX - 5, 0)] {
        let nonsense = setup_header {
            pref_address,
            kernel_alignment,
            ..header()
        };
        let error = load_bzimage(&nonsense, 128 * MIB, None).unwrap_err();
        assert!(matches!(error, BootError::KernelTooLarge { .. }), "{error}");
    }
}
