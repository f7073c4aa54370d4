//! A configuration that a machine can be built from more than once.

use devices::virtio::net::{MacAddress, TapSource};

use super::ConfigError;
use crate::machine::MachineConfig;

impl MachineConfig {
    /// Settles what would otherwise differ from one machine to the next. Refuses what is there only once: a machine's end
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
    use crate::config::Wishes;
    use crate::machine::NetConfig;

    fn with(tap: TapSource) -> MachineConfig {
        let wishes = Wishes {
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
        wishes.check().unwrap()
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
