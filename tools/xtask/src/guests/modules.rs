//! Which kernel modules a set of modules needs, from what each says of itself: packages have no `modules.dep`,
//! which is made on installation.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// One module.
#[derive(Clone, Debug)]
pub(super) struct Module {
    /// File name, e.g. `virtio_blk.ko`.
    pub(super) name: String,
    path: PathBuf,
}

impl Module {
    /// The file.
    pub(super) fn content(&self) -> Result<Vec<u8>> {
        fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))
    }
}

/// The named modules and those that they need, each after what it needs. A name that is built into the kernel
/// needs nothing; an unknown one is an error.
pub(super) fn closure(folder: &Path, names: &[&str]) -> Result<Vec<Module>> {
    let mut found = BTreeMap::new();
    index(&folder.join("kernel"), &mut found)?;
    let list = folder.join("modules.builtin");
    let builtin = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let builtin = builtin
        .lines()
        .filter_map(|line| Some(identity(Path::new(line).file_stem()?.to_str()?)))
        .collect();
    let mut order = LoadOrder {
        found,
        builtin,
        done: BTreeSet::new(),
        modules: Vec::new(),
    };
    for name in names {
        order.add(&identity(name), &[])?;
    }
    Ok(order.modules)
}

struct LoadOrder {
    found: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    done: BTreeSet<String>,
    modules: Vec<Module>,
}

impl LoadOrder {
    fn add(&mut self, name: &str, above: &[&str]) -> Result<()> {
        if self.builtin.contains(name) || self.done.contains(name) {
            return Ok(());
        }
        if above.contains(&name) {
            bail!("module {name} needs itself: {}", above.join(" needs "));
        }
        let Some(path) = self.found.get(name).cloned() else {
            bail!("the kernel package has no module {name}");
        };
        let module = Module {
            name: path.file_name().unwrap_or_default().to_string_lossy().into(),
            path,
        };
        let above = [above, &[name]].concat();
        for needed in depends(&module.content()?) {
            self.add(&identity(&needed), &above)?;
        }
        self.done.insert(name.to_owned());
        self.modules.push(module);
        Ok(())
    }
}

/// The `depends=` entry of a module's `.modinfo`, a section of zero-terminated `key=value` texts.
fn depends(module: &[u8]) -> Vec<String> {
    let entries = module.split(|byte| *byte == 0);
    let value = entries
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .next()
        .unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Module names treat `-` and `_` alike.
fn identity(name: &str) -> String {
    name.replace('-', "_")
}

fn index(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, found)?;
        } else if let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str()?.strip_suffix(".ko"))
        {
            found.insert(identity(name), path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("kernel/drivers")).unwrap();
        fs::write(folder.path().join("modules.builtin"), "kernel/lib/crc-x.ko\n").unwrap();
        for (name, depends) in modules {
            let content = format!("ELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(folder.path().join(format!("kernel/drivers/{name}.ko")), content).unwrap();
        }
        folder
    }

    fn names(folder: &Path, wanted: &[&str]) -> Result<Vec<String>> {
        Ok(closure(folder, wanted)?
            .into_iter()
            .map(|module| module.name)
            .collect())
    }

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let tree = tree(&[
            ("net-x", "failover,ring"),
            ("failover", "ring,crc_x"),
            ("ring", ""),
            ("blk", "ring"),
        ]);
        let order = names(tree.path(), &["net_x", "blk", "crc_x"]).unwrap();
        assert_eq!(order, ["ring.ko", "failover.ko", "net-x.ko", "blk.ko"]);
    }

    #[test]
    fn unknown_and_circular_are_errors() {
        let tree = tree(&[("a", "b"), ("b", "a"), ("c", "nothing")]);
        assert!(
            names(tree.path(), &["a"])
                .unwrap_err()
                .to_string()
                .contains("needs itself")
        );
        assert!(
            names(tree.path(), &["c"])
                .unwrap_err()
                .to_string()
                .contains("no module nothing")
        );
    }
}
