//! What a configuration is checked for.

mod firecracker;

use devices::virtio::block;

use super::*;

fn requested() -> RequestedConfig {
    RequestedConfig {
        kernel: Some("vmlinux".into()),
        memory: Some(64 << 20),
        ..Default::default()
    }
}

#[test]
fn defaults_and_limits() {
    let config = requested().check().unwrap();
    assert_eq!((config.cpus, config.memory), (1, 64 << 20));
    for bad in [0, 33, 1 << 40] {
        let error = RequestedConfig {
            cpus: Some(bad),
            ..requested()
        }
        .check()
        .unwrap_err();
        assert_eq!(error.to_string(), format!("cpus: expected 1 to 32, got {bad}"));
    }
    assert!(matches!(
        RequestedConfig::default().check(),
        Err(ConfigError::NoKernel)
    ));
}

#[test]
fn a_balloon_is_no_larger_than_the_guest() {
    let with = |bytes| RequestedConfig {
        balloon: Some(BalloonConfig {
            bytes,
            deflate_on_oom: true,
        }),
        ..requested()
    };
    with(64 << 20).check().unwrap();
    assert!(matches!(
        with((64 << 20) + 1).check(),
        Err(ConfigError::Balloon { .. })
    ));
}

#[test]
fn devices_have_distinct_names() {
    let disk = |id: &str| DiskConfig {
        id: id.into(),
        path: "x".into(),
        format: block::ImageFormat::Raw,
        backing: Vec::new(),
        read_only: false,
        parameters: block::BlockParameters::default(),
    };
    let twice = RequestedConfig {
        disks: vec![disk("a"), disk("a")],
        ..requested()
    };
    assert!(matches!(twice.check(), Err(ConfigError::DuplicateDevice(id)) if id == "a"));
    let net = |id: &str| NetConfig {
        id: id.into(),
        tap: TapSource::Name(format!("tap-{id}")),
        mac: None,
        queues: 1,
        rx_limits: Limits::default(),
        tx_limits: Limits::default(),
    };
    let of_both_kinds = RequestedConfig {
        disks: vec![disk("a")],
        nets: vec![net("b"), net("a")],
        ..requested()
    };
    assert!(matches!(of_both_kinds.check(), Err(ConfigError::DuplicateDevice(id)) if id == "a"));
    let many = RequestedConfig {
        disks: vec![disk("a")],
        nets: (0..MAX_DEVICES)
            .map(|number| net(&format!("net{number}")))
            .collect(),
        ..requested()
    };
    assert!(matches!(
        many.check(),
        Err(ConfigError::TooManyDevices { got: 13, .. })
    ));
    for bad in ["", "a/b", "rng", "vsock", &"x".repeat(DEVICE_ID_MAX + 1)] {
        let bad = RequestedConfig {
            disks: vec![disk(bad)],
            ..requested()
        };
        assert!(matches!(bad.check(), Err(ConfigError::DeviceId { .. })));
    }
    check_device_id(&"x".repeat(DEVICE_ID_MAX)).unwrap();
}

#[test]
fn network_cards_have_distinct_taps_and_some_queues() {
    let net = |id: &str, tap: TapSource| NetConfig {
        id: id.into(),
        tap,
        mac: None,
        queues: 1,
        rx_limits: Limits::default(),
        tx_limits: Limits::default(),
    };
    let both = |one, other| RequestedConfig {
        nets: vec![net("a", one), net("b", other)],
        ..requested()
    };
    let (name, list) = (|name: &str| TapSource::Name(name.into()), TapSource::Descriptors);
    both(name("x"), name("y")).check().unwrap();
    both(name("x"), list(vec![3, 4])).check().unwrap();
    for shared in [
        both(name("x"), name("x")),
        both(list(vec![3, 4]), list(vec![5, 3])),
        both(list(vec![3, 3]), name("x")),
    ] {
        assert!(matches!(shared.check(), Err(ConfigError::SharedTap)));
    }
    for queues in [0, MAX_QUEUE_PAIRS + 1] {
        let mut requested = both(name("x"), name("y"));
        requested.nets[1].queues = queues;
        let error = requested.check().unwrap_err().to_string();
        assert!(
            error.contains(&format!("\"b\": expected 1 to 16 queues, got {queues}")),
            "{error}"
        );
    }
}

#[test]
fn addresses_that_no_guest_can_have() {
    let with_cid = |guest_cid| RequestedConfig {
        vsock: Some(VsockConfig {
            guest_cid,
            uds: "v.sock".into(),
            limits: Limits::default(),
        }),
        ..requested()
    };
    for bad in [0, 2, u64::from(u32::MAX), 1 << 32 | 3] {
        let error = with_cid(bad).check().unwrap_err();
        let expected = format!("vsock cid: expected 3 to 4294967294, got {bad}");
        assert_eq!(error.to_string(), expected);
    }
    with_cid(3).check().unwrap();
    let disk = |id| DiskConfig {
        id: format!("d{id}"),
        path: "x".into(),
        format: block::ImageFormat::Raw,
        backing: Vec::new(),
        read_only: false,
        parameters: block::BlockParameters::default(),
    };
    let full = RequestedConfig {
        disks: (0..MAX_DEVICES).map(disk).collect(),
        ..with_cid(3)
    };
    let error = full.check().unwrap_err();
    assert_eq!(
        error.to_string(),
        "disks and network cards: expected at most 11, got 12"
    );
}

#[test]
fn a_console_device_is_there_when_it_is_wanted() {
    let with = |has_terminal, ports: &[&str]| RequestedConfig {
        console: ConsoleConfig {
            has_terminal,
            ports: ports.iter().map(|name| ((*name).into(), "x".into())).collect(),
        },
        ..requested()
    };
    let none = with(false, &[]).check().unwrap();
    assert_eq!(
        (none.console, none.boot.cmdline.as_str()),
        (None, DEFAULT_CMDLINE)
    );
    let console = with(true, &[]).check().unwrap();
    assert!(console.console.is_some() && console.boot.cmdline == VIRTIO_CONSOLE_CMDLINE);
    let ports = with(false, &["a", "b"]).check().unwrap();
    assert_eq!(ports.console.unwrap().ports.len(), 2);
    assert_eq!(ports.boot.cmdline, DEFAULT_CMDLINE);
    assert!(matches!(
        with(false, &["a/b"]).check(),
        Err(ConfigError::Ports(_))
    ));
    assert!(matches!(
        with(false, &["a", "a"]).check(),
        Err(ConfigError::Ports(_))
    ));
}

#[test]
fn huge_pages_are_alone() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.json");
    let read = |huge_pages: &str| {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "{huge_pages}"}}}}"#
        );
        std::fs::write(&path, text).unwrap();
        RequestedConfig::from_file(&path)
    };
    let kind = |requested: RequestedConfig| requested.check().map(|config| config.memory_kind);
    assert_eq!(kind(read("None").unwrap()).unwrap(), MemoryKind::Anonymous);
    assert_eq!(kind(read("2M").unwrap()).unwrap(), MemoryKind::HugePages);
    assert!(read("1G").is_err());
    let shared = RequestedConfig {
        shared_memory: true,
        ..Default::default()
    };
    let error = kind(read("2M").unwrap().overridden_by(shared)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "huge pages: expected no shared memory beside them"
    );
    let balloon = RequestedConfig {
        balloon: Some(BalloonConfig {
            bytes: 0,
            deflate_on_oom: true,
        }),
        ..Default::default()
    };
    let error = kind(read("2M").unwrap().overridden_by(balloon)).unwrap_err();
    assert!(matches!(error, ConfigError::BesideHugePages(_)));
}

#[test]
fn an_image_and_what_it_is_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.json");
    std::fs::write(
        &path,
        r#"{"boot-source": {"kernel_image_path": "k"},
            "drives": [{"drive_id": "root", "path_on_host": "top", "format": "qcow2",
                        "backing": [{"path_on_host": "middle"}, {"path_on_host": "base", "format": "raw"}]}]}"#,
    )
    .unwrap();
    let disk = RequestedConfig::from_file(&path).unwrap().disks.remove(0);
    let file = |path: &str, format| block::BackingFile {
        path: path.into(),
        format,
    };
    let expected = [file("middle", None), file("base", Some(block::ImageFormat::Raw))];
    assert_eq!(
        (disk.format, disk.backing.as_slice()),
        (block::ImageFormat::Qcow2, &expected[..])
    );
}

#[test]
fn the_command_line_overrides_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.json");
    std::fs::write(
        &path,
        r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "quiet"},
            "machine-config": {"vcpu_count": 2, "mem_size_mib": 128},
            "drives": [{"drive_id": "root", "path_on_host": "d", "is_root_device": true,
                        "cache_type": "Unsafe", "io_engine": "Sync",
                        "rate_limiter": {"ops": {"size": 9, "refill_time": 100}}}],
            "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0",
                                    "guest_mac": "06:00:AC:10:00:02",
                                    "tx_rate_limiter": {"ops": {"size": 9, "refill_time": 100}}},
                                   {"iface_id": "eth1", "host_dev_name": "tap1"}],
            "balloon": {"amount_mib": 16, "deflate_on_oom": false, "stats_polling_interval_s": 1},
            "vsock": {"guest_cid": 7, "uds_path": "v.sock"},
            "entropy": {"rate_limiter": {"ops": {"size": 9, "refill_time": 100}}}}"#,
    )
    .unwrap();
    let file = RequestedConfig::from_file(&path).unwrap();
    let config = file
        .overridden_by(RequestedConfig {
            cpus: Some(4),
            ..Default::default()
        })
        .check()
        .unwrap();
    assert_eq!(
        (config.cpus, config.memory, config.boot.cmdline.as_str()),
        (4, 128 << 20, "quiet root=/dev/vda rw")
    );
    assert_eq!(config.disks[0].id, "root");
    let nine = Limits {
        bandwidth: None,
        operations: Some(devices::Bucket {
            size: 9,
            one_time_burst: 0,
            refill_time_ms: 100,
        }),
    };
    let expected = block::BlockParameters {
        limits: nine,
        cache: block::CacheMode::Unsafe,
        direct: false,
        engine: block::IoEngine::Sync,
    };
    assert_eq!(config.disks[0].parameters, expected);
    let expected = [
        ("eth0", "tap0", Some("06:00:ac:10:00:02".parse().unwrap())),
        ("eth1", "tap1", None),
    ]
    .map(|(id, tap, mac)| NetConfig {
        id: id.into(),
        tap: TapSource::Name(tap.into()),
        mac,
        queues: 1,
        rx_limits: Limits::default(),
        tx_limits: if mac.is_some() { nine } else { Limits::default() },
    });
    assert_eq!(config.nets, expected);
    let balloon = BalloonConfig {
        bytes: 16 << 20,
        deflate_on_oom: false,
    };
    assert_eq!(config.balloon, Some(balloon));
    let expected = VsockConfig {
        guest_cid: 7,
        uds: "v.sock".into(),
        limits: Limits::default(),
    };
    assert_eq!(config.vsock, Some(expected));
    assert_eq!(config.rng_limits, nine);
}
