//! Firecracker's configuration files, as it publishes them and as programs write them.

use serde_json::{Value, json};

use super::*;

/// `vm_config.json` of Firecracker's tests, with what other versions of it have.
fn published() -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": "vmlinux.bin",
            "boot_args": "console=ttyS0 reboot=k panic=1 pci=off",
            "initrd_path": null
        },
        "drives": [{
            "drive_id": "rootfs",
            "path_on_host": "bionic.rootfs.ext4",
            "is_root_device": true,
            "partuuid": null,
            "is_read_only": false,
            "cache_type": "Unsafe",
            "io_engine": "Sync",
            "rate_limiter": null,
            "socket": null
        }],
        "machine-config": {
            "vcpu_count": 2,
            "mem_size_mib": 1024,
            "smt": false,
            "track_dirty_pages": false,
            "huge_pages": "None",
            "cpu_template": "None"
        },
        "cpu-config": null,
        "balloon": null,
        "network-interfaces": [],
        "vsock": null,
        "logger": null,
        "metrics": null,
        "mmds-config": null,
        "entropy": null,
        "pmem": [],
        "memory-hotplug": null
    })
}

/// Everything that a file can have, with values that are taken.
fn everything() -> Value {
    let mut file = published();
    let limiter = json!({
        "bandwidth": { "size": 0, "one_time_burst": null, "refill_time": 100 },
        "ops": { "size": 9, "one_time_burst": 5, "refill_time": 100 }
    });
    file["boot-source"]["initrd_path"] = "initrd".into();
    file["drives"][0]["rate_limiter"] = limiter.clone();
    let machine = json!({ "ht_enabled": false, "gdb_socket_path": null, "track_dirty_pages": true });
    file["machine-config"]
        .as_object_mut()
        .unwrap()
        .extend(machine.as_object().unwrap().clone());
    let sections = json!({
        "balloon": {
            "amount_mib": 16, "deflate_on_oom": false, "stats_polling_interval_s": 1,
            "free_page_hinting": true, "free_page_reporting": true
        },
        "network-interfaces": [{
            "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:c0:a8:00:02",
            "rx_rate_limiter": limiter, "tx_rate_limiter": limiter, "mtu": null, "allow_mmds_requests": false
        }],
        "vsock": { "guest_cid": 3, "uds_path": "v.sock", "vsock_id": "1" },
        "logger": {
            "log_path": null, "level": "info", "show_level": true, "show_log_origin": true, "module": null,
            "log_fifo": null, "metrics_fifo": null, "options": []
        },
        "entropy": { "rate_limiter": limiter },
        "mmds-version": "V1",
        "serial": null
    });
    file.as_object_mut()
        .unwrap()
        .extend(sections.as_object().unwrap().clone());
    file
}

/// The configuration in a file, or the one line that says why it is refused.
fn read(file: &Value) -> Result<RequestedConfig, String> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.json");
    std::fs::write(&path, file.to_string()).unwrap();
    RequestedConfig::from_file(&path).map_err(|error| migration::chain(&error))
}

/// The paths of all values in a file.
fn pointers(value: &Value, at: &str, found: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(key, value)| (key.clone(), value)).collect(),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .map(|(n, value)| (n.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    for (key, value) in children {
        let path = format!("{at}/{key}");
        pointers(value, &path, found);
        found.push(path);
    }
}

#[test]
fn the_published_file_is_accepted() {
    let config = read(&published()).unwrap().check().unwrap();
    assert_eq!((config.cpus, config.memory), (2, 1 << 30));
    assert_eq!(
        config.boot.cmdline,
        "console=ttyS0 reboot=k panic=1 pci=off root=/dev/vda rw"
    );
    assert_eq!(config.disks[0].parameters.cache, block::CacheMode::Unsafe);
    // Some have fewer keys, or those of their time.
    let mut old = published();
    old["machine-config"] = json!({ "vcpu_count": 2, "mem_size_mib": 1024, "ht_enabled": false });
    old["mmds-version"] = "V1".into();
    for section in [
        "balloon",
        "vsock",
        "entropy",
        "cpu-config",
        "pmem",
        "network-interfaces",
    ] {
        old.as_object_mut().unwrap().remove(section);
    }
    read(&old).unwrap().check().unwrap();
}

/// Where a key can be left out it can be `null`; elsewhere that is refused, and nothing else happens.
#[test]
fn every_key_can_be_null() {
    let whole = everything();
    read(&whole).unwrap().check().unwrap();
    let mut all = Vec::new();
    pointers(&whole, "", &mut all);
    let needed = [
        "boot-source",
        "kernel_image_path",
        "vcpu_count",
        "mem_size_mib",
        "drive_id",
        "path_on_host",
        "iface_id",
        "host_dev_name",
        "guest_cid",
        "uds_path",
        "amount_mib",
        "deflate_on_oom",
        "size",
        "refill_time",
        "0",
    ];
    for path in all {
        let mut file = whole.clone();
        *file.pointer_mut(&path).unwrap() = Value::Null;
        let key = path.rsplit('/').next().unwrap();
        let taken = read(&file);
        assert_eq!(taken.is_err(), needed.contains(&key), "{path}: {taken:?}");
    }
}

#[test]
fn what_would_be_another_machine_is_refused_with_the_reason() {
    for (path, value, words) in [
        (
            "/machine-config/smt",
            json!(true),
            &["smt: expected false, got true", "core of its own"][..],
        ),
        (
            "/machine-config/ht_enabled",
            json!(true),
            &["ht_enabled: expected false, got true"],
        ),
        (
            "/machine-config/gdb_socket_path",
            json!("gdb"),
            &["gdb_socket_path: expected null"],
        ),
        (
            "/machine-config/huge_pages",
            json!("1G"),
            &["unknown variant `1G`"],
        ),
        (
            "/drives/0/socket",
            json!("v.sock"),
            &["socket: expected null, got \"v.sock\"", "vhost-user"],
        ),
        (
            "/network-interfaces/0/mtu",
            json!(9000),
            &["mtu: expected null, got 9000", "tap's"],
        ),
        (
            "/network-interfaces/0/allow_mmds_requests",
            json!(true),
            &["no metadata service"],
        ),
        (
            "/network-interfaces/0/guest_mac",
            json!("c"),
            &["MAC address: expected"],
        ),
        (
            "/logger/log_path",
            json!("log"),
            &["log_path: expected null, got \"log\"", "--log FILE"],
        ),
        (
            "/logger/level",
            json!("Debug"),
            &["level: expected \"Info\", got \"Debug\"", "GODWIT_LOG"],
        ),
        (
            "/logger/metrics_fifo",
            json!("m"),
            &["metrics_fifo: expected null"],
        ),
        (
            "/metrics",
            json!({"metrics_path": "m"}),
            &["metrics: expected null", "GET /metrics"],
        ),
        (
            "/mmds-config",
            json!({"network_interfaces": ["eth0"]}),
            &["mmds-config: expected null", "metadata"],
        ),
        (
            "/cpu-config",
            json!("cpu.json"),
            &["cpu-config: expected null", "--cpu-template"],
        ),
        (
            "/pmem",
            json!([{"id": "p", "path_on_host": "p"}]),
            &["pmem: expected []"],
        ),
        (
            "/memory-hotplug",
            json!({"total_size_mib": 1024}),
            &["memory-hotplug: expected null"],
        ),
        (
            "/serial",
            json!({"serial_out_path": "s"}),
            &["serial: expected null"],
        ),
    ] {
        let mut file = everything();
        *file.pointer_mut(path).unwrap() = value;
        let error = read(&file).unwrap_err();
        for word in words {
            assert!(error.contains(word), "{path}: {word:?} not in {error:?}");
        }
    }
    for (path, key) in [
        ("", "unheard-of"),
        ("/drives/0", "read_only"),
        ("/logger", "colour"),
    ] {
        let mut file = everything();
        file.pointer_mut(path).unwrap()[key] = Value::Null;
        let error = read(&file).unwrap_err();
        assert!(error.contains(&format!("unknown field `{key}`")), "{error}");
    }
    let mut file = everything();
    file["machine-config"]["cpu_template"] = "T2".into();
    assert!(matches!(
        read(&file).unwrap().check(),
        Err(ConfigError::Template(_))
    ));
}

#[test]
fn the_root_disk_is_the_first_and_on_the_command_line() {
    let drive = |id: &str, more: Value| {
        let mut drive = json!({ "drive_id": id, "path_on_host": id });
        drive
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        drive
    };
    let with = |boot_args: &str, drives: &[Value]| {
        let file = json!({
            "boot-source": { "kernel_image_path": "k", "boot_args": boot_args }, "drives": drives
        });
        read(&file)
    };
    let (data, more) = (
        drive("data", json!({})),
        drive("more", json!({ "is_root_device": false })),
    );
    for (root, words) in [
        (json!({ "is_root_device": true }), "root=/dev/vda rw"),
        (
            json!({ "is_root_device": true, "is_read_only": true }),
            "root=/dev/vda ro",
        ),
        (
            json!({ "is_root_device": true, "partuuid": "0eaa91a0-01" }),
            "root=PARTUUID=0eaa91a0-01 rw",
        ),
    ] {
        let drives = [data.clone(), more.clone(), drive("root", root)];
        let requested = with("quiet -- one", &drives).unwrap();
        let over = |cmdline: Option<&str>| RequestedConfig {
            cmdline: cmdline.map(Into::into),
            disks: vec![DiskConfig {
                id: "late".into(),
                path: "late".into(),
                format: block::ImageFormat::Raw,
                backing: Vec::new(),
                read_only: false,
                parameters: block::BlockParameters::default(),
            }],
            ..Default::default()
        };
        let checked = |cmdline| requested.clone().overridden_by(over(cmdline)).check().unwrap();
        let config = checked(None);
        assert_eq!(config.boot.cmdline, format!("quiet {words} -- one"));
        let ids: Vec<_> = config.disks.iter().map(|disk| disk.id.as_str()).collect();
        assert_eq!(ids, ["root", "data", "more", "late"]);
        assert_eq!(checked(Some("debug")).boot.cmdline, format!("debug {words}"));
        // A root on the command line counts more.
        assert_eq!(checked(Some("root=/dev/vdb")).boot.cmdline, "root=/dev/vdb");
    }
    let none = with("quiet", &[data.clone(), more]).unwrap().check().unwrap();
    assert_eq!(
        (none.boot.cmdline.as_str(), none.disks[0].id.as_str()),
        ("quiet", "data")
    );
    let unused = drive("a", json!({ "partuuid": "0eaa91a0-01" }));
    assert_eq!(
        with("quiet", &[unused]).unwrap().check().unwrap().boot.cmdline,
        "quiet"
    );
    let root = |id| drive(id, json!({ "is_root_device": true }));
    let error = with("", &[root("a"), data, root("b")]).unwrap_err();
    assert!(
        error.contains("one with is_root_device at most, got \"a\" and \"b\""),
        "{error}"
    );
}

#[test]
fn a_file_without_an_end_is_refused() {
    let error = RequestedConfig::from_file("/dev/zero".as_ref()).unwrap_err();
    let error = migration::chain(&error);
    assert!(error.contains("expected at most 1048576 bytes"), "{error}");
}
