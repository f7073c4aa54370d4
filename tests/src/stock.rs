//! A Debian guest on the hosts of a lab.

/// The hosts' tap for a guest.
pub const TAP: &str = "tap0";
/// The address of a guest with a card, in the hosts' network.
pub const GUEST: &str = "10.0.0.100";
/// The server on host 0 that sends back what the guest sends.
const ECHO: &str = "10.0.0.1:7007";

/// A Debian guest's machine and work.
#[derive(Clone, Debug)]
pub struct StockGuest {
    /// `vmlinux` or `vmlinuz`.
    pub kernel: &'static str,
    /// vCPUs.
    pub cpus: u32,
    /// As `godwit run` takes it.
    pub memory: &'static str,
    /// Whether the hosts' shared disk is the guest's, formatted, and under load.
    pub disk: bool,
    /// Whether it has a socket device, which is [`StockGuest::VSOCK`] on every host.
    pub vsock: bool,
    /// Whether its console is the virtio one, with a port that is [`StockGuest::PORT`] on every host.
    pub console: bool,
    /// Whether it has a card on the hosts' [`TAP`], and a stream to the echo server on host 0.
    pub net: bool,
    /// More words for the kernel.
    pub words: &'static str,
    /// More options of `godwit run`.
    pub options: &'static [&'static str],
}

impl Default for StockGuest {
    fn default() -> Self {
        Self {
            kernel: "vmlinux",
            cpus: 2,
            memory: "256M",
            disk: false,
            vsock: false,
            console: false,
            net: false,
            words: "",
            options: &[],
        }
    }
}

impl StockGuest {
    /// Where programs on a host connect to it.
    pub const VSOCK: &str = "/run/vsock";
    /// Where programs on a host connect to its port `echo`.
    pub const PORT: &str = "/run/port";

    /// The options of `godwit run`, where the guests are in the folder `guests`.
    pub fn options(&self, guests: &str) -> Vec<String> {
        // Kernel messages would end up in the middle of the agent's lines.
        let mut cmdline = "console=ttyS0 reboot=k panic=-1 quiet loglevel=1".to_owned();
        cmdline.push_str(" godwit.dirty=32M godwit.rate=4M");
        if self.disk {
            cmdline.push_str(" godwit.disk=/dev/vda");
        }
        if self.net {
            cmdline.push_str(&format!(" godwit.address={GUEST}/24 godwit.echo={ECHO}"));
        }
        if self.console {
            cmdline.push_str(" console=hvc0");
        }
        cmdline.push_str(&format!(" {}", self.words));
        let (kernel, initrd) = (
            format!("{guests}/stock/{}", self.kernel),
            format!("{guests}/stock/initrd"),
        );
        let cpus = self.cpus.to_string();
        let mut options = vec!["--kernel", &kernel, "--initrd", &initrd, "--cmdline", &cmdline];
        options.extend(["--cpus", &cpus, "--memory", self.memory]);
        if self.disk {
            options.extend(["--disk", "id=data,path=/dev/vda"]);
        }
        let net = format!("tap={TAP}");
        if self.net {
            options.extend(["--net", &net]);
        }
        options.extend(self.options);
        let vsock = format!("cid=3,uds={}", Self::VSOCK);
        if self.vsock {
            options.extend(["--vsock", &vsock]);
        }
        let port = format!("echo={}", Self::PORT);
        if self.console {
            options.extend(["--console", "virtio", "--port", &port]);
        }
        options.into_iter().map(str::to_owned).collect()
    }
}
