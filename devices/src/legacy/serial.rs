//! The 16550 serial port: `vm-superio`'s registers, with an input queue in front of its FIFO.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use migration_state::{Envelope, Record, StateError};
use serde::{Deserialize, Serialize};
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::log_damper::LogDamper;

/// Bytes of input that wait for the guest before [`Serial::enqueue`] refuses more.
pub const INPUT_LIMIT: usize = 64 << 10;

/// A serial port, to be mapped for 8 ports.
///
/// What the guest sends goes to the console sink at once, byte by byte, on the vCPU's thread: the sink must
/// not block. What is sent to the guest waits until the guest has read what came before.
pub struct Serial {
    uart: vm_superio::Serial<Irq, NoEvents, SerialOutput>,
    irq: EventFd,
    console: SerialOutput,
    input: VecDeque<u8>,
    warnings: LogDamper,
}

/// Why a serial port cannot be built or restored.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// No file descriptor for an event.
    #[error("serial port: cannot make an event")]
    Event(#[source] io::Error),
    /// The saved state is not there or not readable.
    #[error("serial port: cannot read or write the saved state")]
    State(#[from] StateError),
    /// More bytes in the FIFO than it holds, or the interrupt that the state asks for cannot be raised.
    #[error("serial port: saved registers refused")]
    Registers(#[source] vm_superio::serial::Error<io::Error>),
    /// More input than [`INPUT_LIMIT`].
    #[error("serial port: expected at most {INPUT_LIMIT} bytes of waiting input, got {got}")]
    Input {
        /// Bytes of input in the saved state.
        got: usize,
    },
}

impl Serial {
    /// A port after power-on, which interrupts through `irq` and writes the guest's output to `console`.
    pub fn new(irq: EventFd, console: Box<dyn Write + Send>) -> Result<Self, SerialError> {
        let console = SerialOutput(Arc::new(Mutex::new(console)));
        let trigger = Irq(irq.try_clone().map_err(SerialError::Event)?);
        Ok(Self {
            uart: vm_superio::Serial::new(trigger, console.clone()),
            irq,
            console,
            input: VecDeque::new(),
            warnings: LogDamper::default(),
        })
    }

    /// Sends `bytes` to the guest; returns how many were taken. The others did not fit: offer
    /// them again once the guest has read.
    pub fn enqueue(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(INPUT_LIMIT.saturating_sub(self.input.len()));
        self.input.extend(&bytes[..taken]);
        self.feed();
        taken
    }

    /// Adds the saved state, waiting input included, to `envelope`.
    pub fn save(&self, envelope: &mut Envelope, instance: &str) -> Result<(), SerialError> {
        let state = SerialState::from_parts(self.uart.state(), self.input.iter().copied().collect());
        Ok(envelope.put(instance, &state)?)
    }

    /// Restores the state saved in `envelope`. An interrupt that was pending is raised again.
    pub fn restore(&mut self, envelope: &mut Envelope, instance: &str) -> Result<(), SerialError> {
        let (registers, input) = envelope.take::<SerialState>(instance)?.into_parts();
        if input.len() > INPUT_LIMIT {
            return Err(SerialError::Input { got: input.len() });
        }
        let trigger = Irq(self.irq.try_clone().map_err(SerialError::Event)?);
        self.uart = vm_superio::Serial::from_state(&registers, trigger, NoEvents, self.console.clone())
            .map_err(SerialError::Registers)?;
        self.input = input.into();
        self.feed();
        Ok(())
    }

    /// Fills the FIFO once the guest has emptied it: one interrupt for a FIFO's worth, not one for a byte.
    fn feed(&mut self) {
        if !self.input.is_empty() && self.uart.fifo_capacity() == FIFO_SIZE {
            let chunk: Vec<u8> = self
                .input
                .iter()
                .copied()
                .take(self.uart.fifo_capacity())
                .collect();
            match self.uart.enqueue_raw_bytes(&chunk) {
                Ok(taken) => drop(self.input.drain(..taken)),
                Err(error) => {
                    // The bytes are in the FIFO; only the interrupt failed.
                    self.input.drain(..chunk.len());
                    self.warn(&error);
                }
            }
        }
    }

    fn warn(&self, error: &vm_superio::serial::Error<io::Error>) {
        if let Some(count) = self.warnings.count() {
            tracing::warn!(%error, count, "serial port");
        }
    }
}

/// The FIFO is 64 bytes deep; `vm-superio` keeps the constant to itself.
const FIFO_SIZE: usize = 64;

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (index, byte) in (0..).zip(data) {
            *byte = register(offset, index).map_or(0xff, |register| self.uart.read(register));
        }
        self.feed();
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (index, &byte) in (0..).zip(data) {
            if let Some(register) = register(offset, index)
                && let Err(error) = self.uart.write(register, byte)
            {
                self.warn(&error);
            }
        }
        self.feed();
    }
}

fn register(offset: u64, index: u64) -> Option<u8> {
    u8::try_from(offset.checked_add(index)?)
        .ok()
        .filter(|&register| register < 8)
}

struct Irq(EventFd);

impl vm_superio::Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Clone)]
struct SerialOutput(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for SerialOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// Saved state of [`Serial`]: the 16550's registers by their usual names, then the bytes under way.
#[allow(missing_docs, reason = "the data sheet's names say it")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub divisor_low: u8,
    pub divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    /// Received and not read by the guest.
    pub fifo: Vec<u8>,
    /// Waiting for room in the FIFO.
    pub input: Vec<u8>,
}

impl Record for SerialState {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
}

impl SerialState {
    fn from_parts(uart: vm_superio::SerialState, input: Vec<u8>) -> Self {
        Self {
            divisor_low: uart.baud_divisor_low,
            divisor_high: uart.baud_divisor_high,
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            fifo: uart.in_buffer,
            input,
        }
    }

    fn into_parts(self) -> (vm_superio::SerialState, Vec<u8>) {
        let uart = vm_superio::SerialState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo,
        };
        (uart, self.input)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const DATA: u64 = 0;
    const IER: u64 = 1;
    const MCR: u64 = 4;
    const LSR: u64 = 5;

    struct ChannelOutput(mpsc::Sender<u8>);

    impl Write for ChannelOutput {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            bytes.iter().for_each(|&byte| self.0.send(byte).unwrap());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (Serial, EventFd, mpsc::Receiver<u8>) {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, output) = mpsc::channel();
        (
            Serial::new(irq.try_clone().unwrap(), Box::new(ChannelOutput(sender))).unwrap(),
            irq,
            output,
        )
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    fn read_all(serial: &mut Serial) -> Vec<u8> {
        let mut got = Vec::new();
        while read(serial, LSR) & 1 != 0 {
            got.push(read(serial, DATA));
        }
        got
    }

    #[test]
    fn output_reaches_the_console() {
        let (mut serial, _, output) = port();
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"hello");
    }

    #[test]
    fn input_beyond_the_fifo_waits_for_the_guest() {
        let (mut serial, irq, _) = port();
        serial.write(IER, &[1]);
        let sent: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        assert_eq!(serial.enqueue(&sent), sent.len());
        assert_eq!(irq.read().unwrap(), 1);
        assert_eq!(read_all(&mut serial), sent);
        // One interrupt for each FIFO's worth that followed the first.
        assert_eq!(irq.read().unwrap(), (1000 / FIFO_SIZE) as u64);
    }

    #[test]
    fn too_much_input_is_refused_until_there_is_room() {
        let (mut serial, _, _) = port();
        let flood = vec![7; 2 * INPUT_LIMIT];
        let taken = serial.enqueue(&flood);
        assert_eq!(taken, INPUT_LIMIT);
        assert_eq!(serial.enqueue(&flood), FIFO_SIZE);
        assert_eq!(serial.enqueue(&flood), 0);
        assert_eq!(read_all(&mut serial).len(), INPUT_LIMIT + FIFO_SIZE);
        assert_eq!(serial.enqueue(b"x"), 1);
    }

    #[test]
    fn loopback_holds_input_back() {
        let (mut serial, _, _) = port();
        serial.write(MCR, &[0x10]);
        serial.enqueue(b"x");
        assert_eq!(read_all(&mut serial), b"");
        serial.write(MCR, &[0x08]);
        assert_eq!(read_all(&mut serial), b"x");
    }

    #[test]
    fn input_under_way_moves_with_the_port() {
        let (mut source, _, _) = port();
        source.write(IER, &[1]);
        let sent: Vec<u8> = (0..200).collect();
        source.enqueue(&sent);
        assert_eq!(read(&mut source, DATA), 0);
        let mut envelope = Envelope::new();
        source.save(&mut envelope, "com1").unwrap();

        let (mut destination, irq, output) = port();
        destination.restore(&mut envelope, "com1").unwrap();
        envelope.finish().unwrap();
        assert_eq!(read(&mut destination, IER), 1);
        assert_eq!(read_all(&mut destination), sent[1..]);
        assert!(irq.read().unwrap() >= 1);
        destination.write(DATA, b"!");
        assert_eq!(output.recv().unwrap(), b'!');
    }

    #[test]
    fn hostile_state_is_refused() {
        let good = SerialState::from_parts(vm_superio::SerialState::default(), Vec::new());
        for bad in [
            SerialState {
                fifo: vec![0; FIFO_SIZE + 1],
                ..good.clone()
            },
            SerialState {
                input: vec![0; INPUT_LIMIT + 1],
                ..good
            },
        ] {
            let mut envelope = Envelope::new();
            envelope.put("com1", &bad).unwrap();
            let error = port().0.restore(&mut envelope, "com1").unwrap_err();
            assert!(
                matches!(error, SerialError::Registers(_) | SerialError::Input { .. }),
                "{error}"
            );
        }
    }

    #[test]
    fn golden_record() {
        let uart = vm_superio::SerialState {
            interrupt_enable: 5,
            scratch: 0xa5,
            in_buffer: vec![1, 2],
            ..Default::default()
        };
        let state = SerialState::from_parts(uart, vec![3]);
        migration_state::assert_golden(1, "0c000501036008b0a50201020103", &state);
    }

    proptest! {
        #![proptest_config(crate::cases::cases(2000))]
        #[test]
        fn any_access_is_harmless(
            accesses in prop::collection::vec((any::<bool>(), 0u64..10, prop::collection::vec(any::<u8>(), 0..9)), 0..60)
        ) {
            let (mut serial, _, _output) = port();
            serial.enqueue(&[0; 300]);
            for (write, offset, mut data) in accesses {
                if write { serial.write(offset, &data) } else { serial.read(offset, &mut data) }
            }
            serial.read(u64::MAX, &mut [0; 8]);
            let mut envelope = Envelope::new();
            serial.save(&mut envelope, "com1").unwrap();
            port().0.restore(&mut envelope, "com1").unwrap();
        }
    }
}
