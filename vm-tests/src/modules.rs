//! Which kernel modules a driver needs, from `modules.dep` of the kernel in the image.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};

/// `modules.dep`: paths below `/lib/modules/VERSION/` and what each needs.
pub struct Dependencies {
    /// Module name (with `_` for `-`) to its path and the paths it needs.
    by_name: BTreeMap<String, (String, Vec<String>)>,
}

impl Dependencies {
    /// Parses the text of `modules.dep`: `path: needed needed …` a line.
    pub fn parse(text: &str) -> Self {
        let entries = text.lines().filter_map(|line| line.split_once(':')).map(|(path, needs)| {
            (name_of(path), (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect()))
        });
        Self { by_name: entries.collect() }
    }

    /// The paths of `names` and all they need, in an order in which `insmod` works.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in names {
            let (path, needs) = self
                .by_name
                .get(&name.replace('-', "_"))
                .with_context(|| format!("no kernel module {name}"))?;
            // depmod lists the needs of a module so that the last must be loaded first.
            for path in needs.iter().rev().chain([path]) {
                if seen.insert(path.clone()) {
                    order.push(path.clone());
                }
            }
        }
        Ok(order)
    }

    /// The names among `names` that this kernel has as modules.
    pub fn known<'a>(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().copied().filter(|name| self.by_name.contains_key(&name.replace('-', "_"))).collect()
    }
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/ext4/ext4.ko: kernel/lib/crc16.ko kernel/fs/mbcache.ko kernel/fs/jbd2/jbd2.ko
kernel/drivers/usb/host/xhci-pci.ko: kernel/drivers/usb/host/xhci-hcd.ko kernel/drivers/usb/core/usbcore.ko
kernel/drivers/usb/storage/usb-storage.ko.xz: kernel/drivers/usb/core/usbcore.ko
kernel/drivers/usb/core/usbcore.ko:
";

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let order = Dependencies::parse(DEP).load_order(&["xhci_pci", "usb-storage"]).unwrap();
        let names: Vec<String> = order.iter().map(|path| name_of(path)).collect();
        assert_eq!(names, ["usbcore", "xhci_hcd", "xhci_pci", "usb_storage"]);
    }

    #[test]
    fn an_unknown_module_is_named() {
        let error = Dependencies::parse(DEP).load_order(&["floppy"]).unwrap_err();
        assert!(error.to_string().contains("floppy"));
    }
}
