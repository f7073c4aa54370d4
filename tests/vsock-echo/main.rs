//! Speaks to the echo service of a guest from a host of the lab.
//!
//! `vsock-echo UDS PORT` connects to the guest, `vsock-echo UDS -` to a port of its console, `vsock-echo PATH` takes the guest that connects. It says `connected`,
//! and for each line on stdin, which is a number of bytes, `echoed` when so many went there and back; for `end`,
//! `ended` when the stream has.

use std::io::stdin;
use std::os::unix::net::UnixListener;

use anyhow::{Result, bail};
use tests::Echo;

fn main() -> Result<()> {
    let words: Vec<_> = std::env::args().skip(1).collect();
    let mut echo = match words.as_slice() {
        [uds, port] if port == "-" => Echo::port(uds.as_ref())?,
        [uds, port] => Echo::connect(uds.as_ref(), port.parse()?)?,
        [path] => {
            let listener = UnixListener::bind(path)?;
            println!("listening");
            Echo::accept(&listener)?
        }
        _ => bail!("expected UDS PORT or PATH"),
    };
    println!("connected");
    for line in stdin().lines() {
        match line?.as_str() {
            "end" => {
                echo.wait_end()?;
                println!("ended");
                return Ok(());
            }
            bytes => {
                echo.check(bytes.parse()?)?;
                println!("echoed");
            }
        }
    }
    Ok(())
}
