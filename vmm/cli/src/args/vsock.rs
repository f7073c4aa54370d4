//! What `--vsock` takes.

use std::path::PathBuf;

use devices::Limits;
use vmm::machine::VsockConfig;

use super::limits;

/// `run`'s: the guest's address, which may still be out of range, the socket, and limits.
pub(crate) fn run(text: &str) -> Result<VsockConfig<u64>, String> {
    const EXPECTED: &str = "expected cid=N,uds=PATH[,bandwidth=RATE][,iops=N]";
    let (mut cid, mut uds) = (None, None);
    let mut limits = Limits::default();
    for part in text.split(',') {
        if limits::parse_part(&mut limits, part)? {
            continue;
        }
        match part.split_once('=') {
            Some(("cid", text)) => {
                let number = text.parse();
                cid = Some(number.map_err(|_| format!("{EXPECTED}, got {text:?} as the CID"))?);
            }
            Some(("uds", path)) if !path.is_empty() => uds = Some(path.into()),
            _ => return Err(format!("{EXPECTED}, got {part:?}")),
        }
    }
    Ok(VsockConfig {
        guest_cid: cid.ok_or_else(|| format!("{EXPECTED}, got no cid"))?,
        uds: uds.ok_or_else(|| format!("{EXPECTED}, got no uds"))?,
        limits,
    })
}

/// That of who takes a machine over: the socket; the address is the machine's.
pub(crate) fn receive(text: &str) -> Result<PathBuf, String> {
    match text.split_once('=') {
        Some(("uds", path)) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!("expected uds=PATH, got {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_needed_and_nothing_else() {
        let expected = VsockConfig {
            guest_cid: 3,
            uds: "/run/a b".into(),
            limits: limits::alone("iops=7").unwrap(),
        };
        assert_eq!(run("cid=3,uds=/run/a b,iops=7"), Ok(expected));
        for (bad, word) in [
            ("cid=3", "no uds"),
            ("uds=x", "no cid"),
            ("cid=x,uds=x", "\"x\" as the CID"),
            ("cid=-3,uds=x", "\"-3\" as the CID"),
            ("cid=3,uds=", "\"uds=\""),
            ("cid=3,uds=x,ro", "\"ro\""),
            ("cid=3,uds=x,iops=0", "above 0"),
        ] {
            let error = run(bad).unwrap_err();
            assert!(error.contains(word), "{bad}: {error}");
        }
        assert_eq!(receive("uds=x"), Ok("x".into()));
        for bad in ["x", "uds=", "cid=3,uds=x"] {
            assert!(receive(bad).is_err(), "{bad}");
        }
    }
}
