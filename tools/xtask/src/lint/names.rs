//! One name for one type in the whole workspace, and an opening line in each file.
//!
//! Read line by line: rustfmt, which is checked first, puts an item outside of all braces at the beginning of a line,
//! and an associated type or a type inside a function or an inline module further right.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What defines a type.
const KEYWORDS: [&str; 5] = ["enum", "struct", "trait", "type", "union"];

/// Something that is against the rules for names and files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NameViolation {
    /// Several types have one name.
    SharedName { name: String, places: Vec<TypePlace> },
    /// A file does not begin with a line that says what it is about.
    NoOpening { path: PathBuf },
}

/// Where a type is defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TypePlace {
    path: PathBuf,
    line: usize,
}

impl fmt::Display for NameViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SharedName { name, places } => {
                let places: Vec<_> = places.iter().map(TypePlace::to_string).collect();
                write!(
                    f,
                    "{name} is the name of {} types, expected one: {}",
                    places.len(),
                    places.join(" and ")
                )
            }
            Self::NoOpening { path } => write!(
                f,
                "{}: expected a first line \"//! \" that says what the file is about",
                path.display()
            ),
        }
    }
}

impl fmt::Display for TypePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// Everything that is against the rules in the Rust files below `folders`; paths are shown from `root`.
pub(super) fn violations(root: &Path, folders: &[PathBuf]) -> Result<Vec<NameViolation>> {
    let mut files = BTreeSet::new();
    for folder in folders {
        add_files(folder, &mut files)?;
    }
    let mut found = Vec::new();
    let mut types = BTreeMap::<String, Vec<TypePlace>>::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let path = file.strip_prefix(root).unwrap_or(&file).to_owned();
        for (name, line) in definitions(&text) {
            let path = path.clone();
            types
                .entry(name.to_owned())
                .or_default()
                .push(TypePlace { path, line });
        }
        if !has_opening(&text) {
            found.push(NameViolation::NoOpening { path });
        }
    }
    let shared = types.into_iter().filter(|(_, places)| places.len() > 1);
    found.extend(shared.map(|(name, places)| NameViolation::SharedName { name, places }));
    Ok(found)
}

/// Adds the Rust files of a folder and of those in it, but for what was built and what is hidden.
fn add_files(folder: &Path, files: &mut BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        if entry.file_type()?.is_dir() {
            if name != "target" && !name.to_string_lossy().starts_with('.') {
                add_files(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.insert(path);
        }
    }
    Ok(())
}

/// The types that a file defines outside of all braces, with the numbers of their lines.
fn definitions(text: &str) -> impl Iterator<Item = (&str, usize)> {
    let numbered = text.lines().zip(1..);
    numbered.filter_map(|(line, number)| Some((defined(line)?, number)))
}

/// The type that a line defines.
fn defined(line: &str) -> Option<&str> {
    let line = line.strip_prefix("pub").map_or(line, |rest| {
        let scope = rest.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        scope.map_or(rest, |(_, rest)| rest).trim_start()
    });
    let line = line.strip_prefix("unsafe ").unwrap_or(line);
    let (keyword, rest) = line.split_once(' ')?;
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
    let name = &rest[..end.unwrap_or(rest.len())];
    (KEYWORDS.contains(&keyword) && !name.is_empty()).then_some(name)
}

/// Whether a file begins with a line of documentation; a line for the system that runs it, and attributes, may come
/// before.
fn has_opening(text: &str) -> bool {
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.starts_with("//!") {
            return true;
        }
        if line.starts_with("#![") && !line.ends_with(']') {
            // The rest of an attribute of several lines.
            lines.by_ref().find(|line| line.starts_with(")]"));
        } else if !line.starts_with("#!") && !line.is_empty() {
            return false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        folder
    }

    fn shown(files: &[(&str, &str)], folders: &[&str]) -> Vec<String> {
        let tree = tree(files);
        let folders: Vec<_> = folders.iter().map(|name| tree.path().join(name)).collect();
        let found = violations(tree.path(), &folders).unwrap();
        found.iter().map(NameViolation::to_string).collect()
    }

    #[test]
    fn every_kind_of_definition_is_found() {
        let text = "//! Types.\n\
                    struct A;\n\
                    pub enum B<T> {}\n\
                    pub(crate) trait C: Send {}\n\
                    pub(in crate::x) unsafe trait D {}\n\
                    pub union E {}\n\
                    type F<T> = Vec<T>;\n\
                    pub(super) struct G(u8);\n";
        let names: Vec<_> = definitions(text).collect();
        assert_eq!(
            names,
            [
                ("A", 2),
                ("B", 3),
                ("C", 4),
                ("D", 5),
                ("E", 6),
                ("F", 7),
                ("G", 8)
            ]
        );
    }

    #[test]
    fn what_is_no_definition_of_a_file_is_left_alone() {
        let text = "use x::struct_y;\nimpl A {\n    type Err = u8;\n}\nmod inner {\n    struct B;\n}\n\
                    // struct C\nfn type_of() {}\nconst X: u8 = 1;\npub fn structure() {}\npub use a::B;\n";
        assert_eq!(definitions(text).collect::<Vec<_>>(), []);
    }

    #[test]
    fn a_shared_name_is_reported_with_all_its_places() {
        let files = [
            ("one/src/lib.rs", "//! One.\nstruct Same;\nstruct Own;\n"),
            ("two/tests/test.rs", "//! Two.\n\npub enum Same {}\n"),
        ];
        assert_eq!(
            shown(&files, &["one", "two"]),
            ["Same is the name of 2 types, expected one: one/src/lib.rs:2 and two/tests/test.rs:3"]
        );
    }

    #[test]
    fn a_crate_inside_another_counts_once_and_what_was_built_not_at_all() {
        let files = [
            ("one/inner/src/lib.rs", "//! One.\nstruct Same;\n"),
            ("one/target/built.rs", "struct Same;\n"),
            ("one/.hidden/x.rs", "struct Same;\n"),
            ("one/notes.txt", "struct Same;\n"),
        ];
        assert!(shown(&files, &["one", "one/inner"]).is_empty());
    }

    #[test]
    fn a_file_without_an_opening_is_reported() {
        let files = [("one/src/lib.rs", "use std::fs;\n//! Late.\n")];
        assert_eq!(
            shown(&files, &["one"]),
            ["one/src/lib.rs: expected a first line \"//! \" that says what the file is about"]
        );
    }

    #[test]
    fn attributes_may_come_before_the_opening() {
        for good in [
            "//! X.\n",
            "#!/usr/bin/env x\n//! X.\n",
            "#![no_std]\n#![no_main]\n\n//! X.\n",
            "#![allow(\n    a,\n    b\n)]\n//! X.\n",
        ] {
            assert!(has_opening(good), "{good:?}");
        }
        for bad in [
            "",
            "#![no_std]\n",
            "// X.\n//! X.\n",
            "/// X.\nstruct A;\n",
            "#![allow(\n    a\n)]\nuse x;\n//! X.\n",
        ] {
            assert!(!has_opening(bad), "{bad:?}");
        }
    }
}
