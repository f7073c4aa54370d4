//! What the workspace may depend on: licences, crates, versions, sources.

use std::collections::BTreeMap;
use std::fmt;

use cargo_metadata::{Metadata, Package};

use super::licence;

/// Licences that a program under Apache-2.0 can be shipped with.
const LICENCES: [&str; 9] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "MIT",
    "Unicode-3.0",
    "Zlib",
];

/// Crates that must not come in, and why.
const BANNED: [(&str, &str); 6] = [
    (
        "bincode",
        "version 3 is a deliberate compile error, and version 1 is not maintained",
    ),
    ("native-tls", "links the system's OpenSSL: no static binary"),
    ("openssl", "links the system's OpenSSL: no static binary"),
    ("openssl-sys", "links the system's OpenSSL: no static binary"),
    ("serde_yaml", "not maintained"),
    ("userfaultfd", "needs libclang at build time"),
];

/// Crates that may be there in several versions: their name, in which versions, and why.
const DUPLICATES: [(&str, &[&str], &str); 6] = [
    ("bitflags", &["1", "2"], "vmm-sys-util is still at 1"),
    ("cpufeatures", &["0.2", "0.3"], "sha2 is still at 0.2"),
    (
        "embedded-io",
        &["0.4", "0.6"],
        "postcard offers both, and we use neither",
    ),
    ("miniz_oxide", &["0.8", "0.9"], "imago is still at 0.8"),
    ("nix", &["0.30", "0.31"], "imago is still at 0.30"),
    ("syn", &["2", "3"], "derive macros are on their way to 3"),
];

/// Something that is against the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    Licence { package: String, got: String },
    Banned { package: String, reason: &'static str },
    Duplicate { name: String, versions: Vec<String> },
    Source { package: String, got: String },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Licence { package, got } => {
                write!(
                    f,
                    "{package}: licence {got}, expected one of {}",
                    LICENCES.join(", ")
                )
            }
            Self::Banned { package, reason } => write!(f, "{package} is banned: {reason}"),
            Self::Duplicate { name, versions } => {
                write!(f, "{name}: expected one version, got {}", versions.join(", "))
            }
            Self::Source { package, got } => {
                write!(
                    f,
                    "{package} comes from {got}, expected the package registry or the workspace"
                )
            }
        }
    }
}

/// Everything that is against the policy.
pub(super) fn violations(metadata: &Metadata) -> Vec<Violation> {
    let packages = || metadata.packages.iter().filter(|package| used(metadata, package));
    let mut found: Vec<_> = packages()
        .flat_map(|package| of_package(metadata, package))
        .collect();
    let mut versions = BTreeMap::<&str, Vec<String>>::new();
    for package in packages() {
        versions
            .entry(package.name.as_str())
            .or_default()
            .push(package.version.to_string());
    }
    found.extend(
        versions
            .into_iter()
            .filter_map(|(name, versions)| duplicate(name, versions)),
    );
    found
}

/// Whether it is part of a build: the lock file also has what only other platforms or features use.
fn used(metadata: &Metadata, package: &Package) -> bool {
    let resolve = metadata.resolve.as_ref();
    resolve.is_none_or(|resolve| resolve.nodes.iter().any(|node| node.id == package.id))
}

fn of_package(metadata: &Metadata, package: &Package) -> Vec<Violation> {
    let mut found = Vec::new();
    let shown = format!("{} {}", package.name, package.version);
    let source = package.source.as_ref().map(|source| source.repr.as_str());
    if metadata.workspace_members.contains(&package.id) {
        return found;
    }
    if !source.is_some_and(|source| source.starts_with("registry+")) {
        let got = source.unwrap_or(package.manifest_path.as_str()).to_owned();
        found.push(Violation::Source {
            package: shown.clone(),
            got,
        });
    }
    let licence = package.license.as_deref().unwrap_or("(none)");
    if !licence::satisfied(licence, &LICENCES) {
        found.push(Violation::Licence {
            package: shown.clone(),
            got: licence.to_owned(),
        });
    }
    if let Some((_, reason)) = BANNED.iter().find(|(name, _)| *name == package.name.as_str()) {
        found.push(Violation::Banned {
            package: shown,
            reason,
        });
    }
    found
}

fn duplicate(name: &str, mut versions: Vec<String>) -> Option<Violation> {
    if versions.len() == 1 {
        return None;
    }
    let allowed = DUPLICATES
        .iter()
        .find(|(allowed, ..)| *allowed == name)
        .map(|(_, versions, _)| *versions);
    let is = |version: &str, allowed: &str| {
        version
            .strip_prefix(allowed)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    // Two versions that one entry stands for are two too many.
    let fits = |allowed: &&str| versions.iter().filter(|version| is(version, allowed)).count() <= 1;
    let known =
        |version: &String| allowed.is_some_and(|allowed| allowed.iter().any(|allowed| is(version, allowed)));
    if versions.iter().all(known) && allowed.is_some_and(|allowed| allowed.iter().all(fits)) {
        return None;
    }
    versions.sort();
    Some(Violation::Duplicate {
        name: name.to_owned(),
        versions,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const REGISTRY: &str = "registry+https://registry.example/index";

    fn package(name: &str, version: &str, licence: Option<&str>, source: Option<&str>) -> Value {
        json!({
            "name": name, "version": version, "id": format!("{name}@{version}"), "license": licence,
            "source": source, "dependencies": [], "targets": [], "features": {},
            "manifest_path": format!("/somewhere/{name}/Cargo.toml"),
        })
    }

    fn found(packages: &[Value]) -> Vec<Violation> {
        let mut all = vec![package("ours", "0.1.0", None, None)];
        all.extend(packages.iter().cloned());
        let metadata = json!({
            "packages": all, "workspace_members": ["ours@0.1.0"], "resolve": null, "version": 1,
            "workspace_root": "/somewhere", "target_directory": "/somewhere/target",
        });
        violations(&serde_json::from_value(metadata).unwrap())
    }

    fn good(name: &str, version: &str) -> Value {
        package(name, version, Some("MIT OR Apache-2.0"), Some(REGISTRY))
    }

    #[test]
    fn what_is_good_is_left_alone() {
        assert_eq!(found(&[good("a", "1.0.0"), good("b", "1.0.0")]), []);
    }

    #[test]
    fn bad_licences_are_found() {
        for (licence, shown) in [(Some("GPL-3.0-only"), "GPL-3.0-only"), (None, "(none)")] {
            let expected = Violation::Licence {
                package: "a 1.0.0".into(),
                got: shown.into(),
            };
            assert_eq!(
                found(&[package("a", "1.0.0", licence, Some(REGISTRY))]),
                [expected]
            );
        }
    }

    #[test]
    fn banned_crates_are_found() {
        assert!(
            matches!(&found(&[good("openssl-sys", "0.9.0")])[..], [Violation::Banned { package, .. }] if package == "openssl-sys 0.9.0")
        );
    }

    #[test]
    fn other_sources_are_found() {
        for (source, got) in [
            (Some("git+https://git.example/a"), "git+https://git.example/a"),
            (None, "/somewhere/a/Cargo.toml"),
        ] {
            let expected = Violation::Source {
                package: "a 1.0.0".into(),
                got: got.into(),
            };
            assert_eq!(found(&[package("a", "1.0.0", Some("MIT"), source)]), [expected]);
        }
    }

    #[test]
    fn duplicates_are_found() {
        let twice = |name: &str, first: &str, second: &str| {
            let expected = Violation::Duplicate {
                name: name.into(),
                versions: vec![first.into(), second.into()],
            };
            (found(&[good(name, second), good(name, first)]), [expected])
        };
        let (got, expected) = twice("a", "1.0.0", "2.0.0");
        assert_eq!(got, expected);
        // Allowed in other versions, and not twice in one.
        let (got, expected) = twice("bitflags", "2.0.0", "3.0.0");
        assert_eq!(got, expected);
        let (got, expected) = twice("bitflags", "2.0.0", "2.1.0");
        assert_eq!(got, expected);
        assert_eq!(found(&[good("bitflags", "1.3.2"), good("bitflags", "2.1.0")]), []);
    }
}
