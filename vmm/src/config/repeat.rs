//! Makes a configuration one from which a machine can be built more than once.

use devices::virtio::net::{MacAddress, TapSource};

use super::ConfigError;
use crate::machine::MachineConfig;

impl MachineConfig {
    /// Chooses what would otherwise be chosen anew for each machine. Refuses what exists only once: the end of a machine
    /// closes the descriptors that it was given.
    pub fn make_repeatable(&mut self) -> Result<(), ConfigError> {
        for net in &mut self.nets {
            let id = net.id.clone();
            if let TapSource::Descriptors(_) = net.tap {
                return Err(ConfigError::TapOnce { id });
            }
            if net.mac.is_none() {
                let random = MacAddress::random();
                net.mac = Some(random.map_err(|source| ConfigError::RandomMac { id, source })?);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RequestedConfig;
    use crate::machine::NetConfig;

    fn with(tap: TapSource) -> MachineConfig {
        let requested = RequestedConfig {
            kernel: Some("vmlinux".into()),
            nets: vec![NetConfig {
                id: "net0".into(),
                tap,
                mac: None,
                queues: 1,
                rx_limits: Default::default(),
                tx_limits: Default::default(),
            }],
            cpu_template: Some("host".into()),
            ..Default::default()
        };
        requested.check().unwrap()
    }

    #[test]
    fn a_card_keeps_its_address() {
        let mut config = with(TapSource::Name("tap0".into()));
        config.make_repeatable().unwrap();
        let mac = config.nets[0].mac.unwrap();
        config.make_repeatable().unwrap();
        assert_eq!(config.nets[0].mac, Some(mac));
    }

    #[test]
    fn descriptors_are_there_once() {
        let refused = with(TapSource::Descriptors(vec![3])).make_repeatable();
        assert!(matches!(refused, Err(ConfigError::TapOnce { id }) if id == "net0"));
    }
}
