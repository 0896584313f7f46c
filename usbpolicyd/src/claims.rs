//! Ports that are kept from the host's drivers (`USBDEVFS_CLAIM_PORT`): both halves of each connector that a rule names,
//! and all ports of hubs below a connector that a rule names with its subtree.
//!
//! A claim belongs to the open file of the hub. The kernel leaves a device on a claimed port unconfigured, so no driver
//! ever sees it (`hub.c usb_hub_claim_port`, `generic.c`). A hub on a claimed port would be dead too: its port is let go
//! for the moment in which it gets its configuration.
//!
//! [`plan`] is pure; [`Claims::carry_out`] talks to the kernel and runs on a worker.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd};

use common::usbfs::UsbfsFile;
use nix::errno::Errno;

use crate::broker::Failure;
use crate::facts::HostUseLevel;
use crate::policy::compile::CompiledPolicy;
use crate::sysfs::{Hub, HubPlace, Plug, Present, Scan};
use crate::topology::{Connector, PortAddress, RootHub};
use crate::usbnode::Nodes;

/// What should be claimed, given what is plugged in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    hubs: Vec<(Hub, BTreeSet<u8>)>,
    /// Hubs without configuration on a claimed port, with the hub and port they hang on.
    dead: Vec<(Present, Plug, u8)>,
}

impl Plan {
    /// Whether something waits that is not there to be claimed yet.
    pub fn has_dead_hubs(&self) -> bool {
        !self.dead.is_empty()
    }
}

/// One hub whose ports we hold.
#[derive(Debug)]
struct Held {
    name: String,
    file: UsbfsFile,
    ports: BTreeSet<u8>,
    /// The file comes from a former run, which may have claimed ports by it already.
    inherited: bool,
}

/// All claims.
#[derive(Debug, Default)]
pub struct Claims {
    held: BTreeMap<Plug, Held>,
}

/// What came of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Hubs that were opened: their files go to the service manager's store.
    pub opened: Vec<Plug>,
    /// Hubs that were closed.
    pub closed: Vec<Plug>,
    /// Ports that were given back, by name.
    pub released: Vec<String>,
    /// What went wrong.
    pub problems: Vec<String>,
    /// Hubs came to life: look again.
    pub look_again: bool,
}

/// Works out the plan: what rules name, and the connectors in `kept`, whose devices are with VMs by files that need the
/// claim ([`crate::usbnode::Options::confine`]).
pub fn plan(policy: &CompiledPolicy, scan: &Scan, kept: &[Connector]) -> Plan {
    let subtrees = policy.claimed_subtrees();
    let mut ports: BTreeMap<usize, BTreeSet<u8>> = BTreeMap::new();
    for half in policy.claimed_connectors().iter().chain(&subtrees).chain(kept).flat_map(|one| &one.halves) {
        let Some((index, number)) = hub_of(scan, half) else { continue };
        // The host needs what sits there: a claim would keep its driver away after the next reset.
        let is_needed = |device: &&Present| {
            device.facts.connector.halves.contains(half)
                && device.facts.host_use.iter().any(|one| one.level == HostUseLevel::Protected)
        };
        if !scan.devices.iter().any(|device| is_needed(&device)) {
            ports.entry(index).or_default().insert(number);
        }
    }
    for (index, hub) in scan.hubs.iter().enumerate() {
        let HubPlace::Port(port) = &hub.place else { continue };
        let connector = Connector::single(port.clone());
        if subtrees.iter().any(|subtree| subtree.is_at_or_above(&connector)) {
            ports.entry(index).or_default().extend(1..=hub.ports);
        }
    }
    let dead = scan.devices.iter().filter(|device| {
        device.facts.is_hub() && device.facts.active_configuration.is_none() && device.facts.authorized
    });
    let dead = dead.filter_map(|device| {
        let of_bus = |half: &&PortAddress| half.chain == device.facts.chain;
        let half = device.facts.connector.halves.iter().find(of_bus)?;
        let (index, number) = hub_of(scan, half)?;
        let claimed = ports.get(&index)?.contains(&number);
        claimed.then(|| (device.clone(), scan.hubs[index].plug.clone(), number))
    });
    let dead = dead.collect();
    Plan { hubs: ports.into_iter().map(|(index, ports)| (scan.hubs[index].clone(), ports)).collect(), dead }
}

/// The hub that has a port, and the port's number there.
fn hub_of(scan: &Scan, port: &PortAddress) -> Option<(usize, u8)> {
    let place = match port.parent() {
        Some(parent) => HubPlace::Port(parent),
        None => HubPlace::Root(RootHub { controller: port.controller.clone(), half: port.half }),
    };
    let index = scan.hubs.iter().position(|hub| hub.place == place)?;
    Some((index, *port.chain.ports().last()?))
}

impl Claims {
    /// Takes the file of a hub that the service manager kept for us, if the hub is still the same.
    pub fn inherit(&mut self, file: UsbfsFile, inode: u64, scan: &Scan) -> bool {
        let Ok(info) = file.connection_info() else { return false };
        let is_it = |hub: &&Hub| hub.plug.address == info.address && hub.plug.inode == inode;
        let Some(hub) = scan.hubs.iter().find(is_it) else { return false };
        let held = Held { name: hub.name.clone(), file, ports: BTreeSet::new(), inherited: true };
        self.held.insert(hub.plug.clone(), held);
        true
    }

    /// Claims and releases until all is as planned.
    pub fn carry_out(&mut self, nodes: &Nodes, plan: &Plan) -> Outcome {
        let mut outcome = Outcome::default();
        let wanted: BTreeSet<&Plug> = plan.hubs.iter().map(|(hub, _)| &hub.plug).collect();
        self.held.retain(|plug, held| {
            let stays = wanted.contains(plug);
            if !stays {
                outcome.released.extend(held.names());
                for port in &held.ports {
                    // The store of the service manager has the file too: closing ours would not be enough.
                    let _ = held.file.release_port(*port);
                }
                // Closing the file gives the ports back.
                outcome.closed.push(plug.clone());
            }
            stays
        });
        for (hub, ports) in &plan.hubs {
            if !self.held.contains_key(&hub.plug) {
                match nodes.open_hub(hub) {
                    Ok(file) => {
                        let held =
                            Held { name: hub.name.clone(), file, ports: BTreeSet::new(), inherited: false };
                        self.held.insert(hub.plug.clone(), held);
                        outcome.opened.push(hub.plug.clone());
                    }
                    Err(error) => {
                        outcome.problems.push(Failure::from(&error).text);
                        continue;
                    }
                }
            }
            if let Some(held) = self.held.get_mut(&hub.plug) {
                held.set(ports, &mut outcome);
            }
        }
        for (hub, parent, port) in &plan.dead {
            let Some(held) = self.held.get(parent) else { continue };
            let released = held.file.release_port(*port);
            match nodes.configure(hub) {
                Ok(()) => outcome.look_again = true,
                Err(error) => outcome.problems.push(Failure::from(&error).text),
            }
            if released.is_ok()
                && let Err(errno) = held.file.claim_port(*port)
            {
                outcome.problems.push(format!("cannot claim port {port} of {} again: {errno}", held.name));
            }
        }
        outcome
    }

    /// The open file of a hub, for the service manager's store.
    pub fn file(&self, plug: &Plug) -> Option<BorrowedFd<'_>> {
        Some(self.held.get(plug)?.file.as_fd())
    }

    /// Names of the claimed ports as the kernel writes them: `usb1-port4`.
    pub fn ports(&self) -> Vec<String> {
        self.held.values().flat_map(Held::names).collect()
    }
}

impl Held {
    fn names(&self) -> Vec<String> {
        self.ports.iter().map(|port| format!("{}-port{port}", self.name)).collect()
    }

    fn set(&mut self, wanted: &BTreeSet<u8>, outcome: &mut Outcome) {
        let problems = &mut outcome.problems;
        for port in self.ports.difference(wanted) {
            outcome.released.push(format!("{}-port{port}", self.name));
            // Fails only when the port is gone.
            let _ = self.file.release_port(*port);
        }
        self.ports.retain(|port| wanted.contains(port));
        for port in wanted {
            if self.ports.contains(port) {
                continue;
            }
            match self.file.claim_port(*port) {
                Ok(()) => {
                    self.ports.insert(*port);
                }
                // By this very file, in a former life.
                Err(Errno::EBUSY) if self.inherited => {
                    self.ports.insert(*port);
                }
                Err(Errno::EBUSY) => {
                    problems.push(format!("port {port} of {} is claimed by another program", self.name));
                }
                Err(errno) => problems.push(format!("cannot claim port {port} of {}: {errno}", self.name)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{HostUse, HostUseKind};
    use crate::policy::compile::compile;
    use crate::policy::load::load_one;
    use crate::sysfs::tests::Tree;

    fn planned(scan: &Scan, rules: &str) -> Vec<String> {
        planned_with(scan, rules, &[])
    }

    fn planned_with(scan: &Scan, rules: &str, kept: &[Connector]) -> Vec<String> {
        let text = format!("schema = 1\n[vms.work]\n{rules}");
        let policy = compile(&load_one("policy.toml", &text).unwrap().policy, &scan.topology);
        let plan = plan(&policy, scan, kept);
        let names = |(hub, ports): &(Hub, BTreeSet<u8>)| format!("{} {ports:?}", hub.name);
        let mut all: Vec<String> = plan.hubs.iter().map(names).collect();
        all.sort();
        all.extend(plan.dead.iter().map(|(hub, ..)| format!("dead {}", hub.facts.sys_name)));
        all
    }

    const PORT: &str = "[[assign]]\nvm = \"work\"\nmatch = { at = \"pci-0000:00:14.0/usb2:4\" }";

    #[test]
    fn both_halves_of_a_named_connector_are_claimed() {
        assert_eq!(planned(&Tree::new().scan(), PORT), ["usb1 {4}", "usb2 {4}"]);
    }

    #[test]
    fn rules_without_a_place_or_without_claims_claim_nothing() {
        let scan = Tree::new().scan();
        assert!(planned(&scan, "[[assign]]\nvm = \"work\"\nmatch = { id = \"0781:5581\" }").is_empty());
        assert!(planned(&scan, &format!("{PORT}\nclaim_ports = false")).is_empty());
    }

    #[test]
    fn port_of_a_device_with_a_confined_file_stays_claimed_when_no_rule_names_it_any_more() {
        let tree = Tree::new();
        tree.plug("1-4", 3);
        let scan = tree.scan();
        let by_id = "[[assign]]\nvm = \"work\"\nmatch = { id = \"0781:5581\" }";
        let kept = [scan.devices[0].facts.connector.clone()];
        assert_eq!(planned_with(&scan, by_id, &kept), ["usb1 {4}", "usb2 {4}"]);
    }

    #[test]
    fn port_of_a_device_that_the_host_needs_is_left_alone() {
        let tree = Tree::new();
        tree.plug("1-4", 3);
        let mut scan = tree.scan();
        assert_eq!(planned(&scan, PORT).len(), 2);
        let (kind, level) = (HostUseKind::Storage, HostUseLevel::Protected);
        scan.devices[0].facts.host_use.push(HostUse { kind, level, why: "root".into() });
        assert!(planned(&scan, PORT).is_empty());
    }

    #[test]
    fn hub_in_a_claimed_subtree_is_brought_to_life_and_its_ports_claimed() {
        let tree = Tree::new();
        let hub = tree.plug("1-4", 3);
        let rules = "[connectors.bench]\nat = \"pci-0000:00:14.0/usb2:4\"\nsubtree = true\n\
                     [[assign]]\nvm = \"work\"\nmatch = { at = \"bench\" }";
        let mut scan = tree.scan();
        scan.devices[0].facts.class.class = crate::facts::CLASS_HUB;
        scan.devices[0].facts.active_configuration = None;
        assert_eq!(planned(&scan, rules), ["usb1 {4}", "usb2 {4}", "dead 1-4"]);
        std::fs::create_dir(hub.join("1-4:1.0/1-4-port1")).unwrap();
        std::fs::create_dir(hub.join("1-4:1.0/1-4-port2")).unwrap();
        assert_eq!(planned(&tree.scan(), rules), ["1-4 {1, 2}", "usb1 {4}", "usb2 {4}"]);
    }
}
