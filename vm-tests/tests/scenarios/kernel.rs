//! What usbpolicyd takes for granted of the kernel, checked on the kernel of the host under test.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};
use vm_tests::play::SHORT;
use vm_tests::{HostConfig, Mark, Plugged, UsbDevice, scenario};

#[test]
fn the_kernel_behaves_as_the_sheet_of_facts_says() -> Result<()> {
    scenario(&HostConfig::default(), |host| {
        let probes = host.spawn(&["kernel-probes"])?;
        let mut known: BTreeMap<&str, Plugged> = BTreeMap::new();
        let mut mark = Mark::START;
        loop {
            let line = probes.log().wait_after(mark, "", 5 * SHORT)?;
            mark = line.mark;
            let words: Vec<&str> = line.text.split_whitespace().collect();
            match words.as_slice() {
                ["order", "plug", name] => match (known.get(name), *name) {
                    (Some(plugged), _) => host.replug(plugged)?,
                    (None, "stick") => {
                        drop(known.insert("stick", host.plug(UsbDevice::stick("stick").port("4"))?))
                    }
                    (None, "keys") => {
                        drop(known.insert("keys", host.plug(UsbDevice::keyboard("keys").port("5"))?))
                    }
                    (None, "hub") => drop(known.insert("hub", host.plug(UsbDevice::hub("hub").port("6"))?)),
                    _ => bail!("no {name} here"),
                },
                ["order", "pull", name] if known.contains_key(name) => host.unplug(&known[name])?,
                ["probes", "are", "over"] => break,
                _ => println!("{}", line.text),
            }
        }
        let bad = probes.log().all_after(Mark::START, " BAD ");
        ensure!(bad.is_empty(), "this kernel is another:\n{}", bad.join("\n"));
        Ok(())
    })
}
