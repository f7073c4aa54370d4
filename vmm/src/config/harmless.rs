//! Keys of Firecracker's configuration file that are not served here. A key is accepted as long as it asks for nothing,
//! and refused with the reason where it asks for something: the user must not get another machine than the file
//! describes.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// A value, or its default for `null`, which Firecracker's own files have for what they do not use.
pub(super) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// A function for each key, which takes `null` and what else asks for nothing.
macro_rules! harmless {
    ($($key:ident: $asks_for_nothing:expr, $expected:literal, $reason:literal;)*) => {$(
        pub(super) fn $key<'de, D: Deserializer<'de>>(from: D) -> Result<(), D::Error> {
            const KEY: &str = stringify!($key);
            check(from, KEY, $asks_for_nothing, concat!("expected ", $expected), $reason)
        }
    )*};
}

harmless! {
    smt: |value| *value == false, "false", "each vCPU is a core of its own";
    ht_enabled: |value| *value == false, "false", "each vCPU is a core of its own";
    gdb_socket_path: |_| false, "null", "there is no debugger's socket";
    cpu_config: |_| false, "null", "processors are masked by --cpu-template";
    socket: |_| false, "null", "there are no vhost-user disks";
    mtu: |_| false, "null", "the guest gets the tap's";
    allow_mmds_requests: |value| *value == false, "false", "there is no metadata service";
    mmds_config: |_| false, "null", "there is no metadata service";
    metrics: |_| false, "null", "`godwit metrics` and GET /metrics show them";
    log_path: |_| false, "null", "the log's file is --log FILE";
    log_fifo: |_| false, "null", "the log's file is --log FILE";
    metrics_fifo: |_| false, "null", "`godwit metrics` and GET /metrics show them";
    level: |value| value.as_str().is_some_and(|level| level.eq_ignore_ascii_case("info")), "\"Info\"",
        "the log's level is in the variable GODWIT_LOG";
    module: |_| false, "null", "what is logged is in the variable GODWIT_LOG";
    options: |value| value.as_array().is_some_and(Vec::is_empty), "[]",
        "what is logged is in the variable GODWIT_LOG";
    pmem: |value| value.as_array().is_some_and(Vec::is_empty), "[]", "there are no such devices";
    memory_hotplug: |_| false, "null", "a guest has the memory that it started with";
    serial: |_| false, "null", "the serial port is standard output";
}

fn check<'de, D: Deserializer<'de>>(
    from: D,
    key: &str,
    asks_for_nothing: impl Fn(&Value) -> bool,
    expected: &str,
    reason: &str,
) -> Result<(), D::Error> {
    let value = Value::deserialize(from)?;
    if value.is_null() || asks_for_nothing(&value) {
        return Ok(());
    }
    // Sections have hyphens where their functions cannot.
    let shown = match key {
        "cpu_config" | "mmds_config" | "memory_hotplug" => key.replace('_', "-"),
        _ => key.into(),
    };
    Err(D::Error::custom(format_args!(
        "{shown}: {expected}, got {value}: {reason}"
    )))
}
