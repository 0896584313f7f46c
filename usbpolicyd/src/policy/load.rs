//! Puts the files of a policy together.
//!
//! Files are read by somebody else and come in as text. Vendor files come first, then the main file (or files, in the
//! order given), then the administrator's drop-ins, each directory by file name. A table or named rule in a later file replaces the one of
//! that name in an earlier file; a drop-in of the administrator takes the place of the vendor's file of the same name,
//! so an empty one masks it.

use std::collections::BTreeMap;

use super::parse::{Document, parse_file};
use super::problem::{Origin, Problem, Severity, quote};
use super::reader::closest;
use super::schema::{Match, PlaceRef, Policy};

/// The largest file we read.
pub const FILE_MAX: usize = 1 << 20;

/// Which directory a file comes from, weakest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// `/usr/lib/usbpolicyd/policy.d`.
    Vendor,
    /// `/etc/usbpolicyd/policy.toml`.
    Main,
    /// `/etc/usbpolicyd/policy.d`.
    Local,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where it comes from.
    pub layer: Layer,
    /// Its path, for messages; the part after the last `/` is its name.
    pub path: String,
    /// What is in it.
    pub text: String,
}

impl Source {
    fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// A policy that can be used, and what is worth knowing about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The policy.
    pub policy: Policy,
    /// Notes only: what replaces what.
    pub notes: Vec<Problem>,
}

/// Puts the files together. Any error makes the whole policy unusable, and all errors are returned.
pub fn load(sources: &[Source]) -> Result<Loaded, Vec<Problem>> {
    let mut sorted: Vec<&Source> = sources.iter().collect();
    sorted.sort_by_key(|source| (source.layer, if source.layer == Layer::Main { "" } else { source.name() }));
    let mut merge = Merge::default();
    for (index, source) in sorted.iter().enumerate() {
        let masks = |other: &&&Source| {
            source.layer == Layer::Vendor && other.layer == Layer::Local && source.name() == other.name()
        };
        if let Some(mask) = sorted.iter().find(masks) {
            let message = format!("{} is masked by {}", source.path, mask.path);
            merge.problems.push(Problem::new(Severity::Note, "masked", message));
            continue;
        }
        if source.text.len() > FILE_MAX {
            let message = format!("{} is larger than {FILE_MAX} bytes", source.path);
            merge.problems.push(Problem::new(Severity::Error, "too-large", message));
            continue;
        }
        let (document, problems) = parse_file(&source.path, &source.text);
        merge.problems.extend(problems);
        merge.add(index, document);
    }
    let Merge { policy, mut problems, .. } = merge;
    check_names(&policy, &mut problems);
    quote(&mut problems, sources);
    problems.sort_by(|a, b| a.origin.cmp(&b.origin));
    if problems.iter().any(|problem| problem.severity == Severity::Error) {
        problems.retain(|problem| problem.severity == Severity::Error);
        return Err(problems);
    }
    Ok(Loaded { policy, notes: problems })
}

/// Loads one text, as `usbpolicyctl check FILE` does.
pub fn load_one(path: &str, text: &str) -> Result<Loaded, Vec<Problem>> {
    load(&[Source { layer: Layer::Main, path: path.to_owned(), text: text.to_owned() }])
}

#[derive(Default)]
struct Merge {
    policy: Policy,
    problems: Vec<Problem>,
    /// File that each rule name comes from, for deny and assign.
    rule_files: [BTreeMap<String, usize>; 2],
}

impl Merge {
    fn add(&mut self, file: usize, document: Document) {
        let policy = &mut self.policy;
        if let Some(defaults) = document.defaults {
            policy.defaults = defaults;
        }
        if let Some(protect) = document.protect {
            policy.protect = protect;
        }
        if let Some(revoke) = document.revoke {
            policy.revoke = revoke;
        }
        for (name, def) in document.connectors {
            let origin = def.origin.clone();
            let was = policy.connectors.insert(name.clone(), def).map(|was| was.origin);
            replaced(&mut self.problems, "connector", &name, &origin, was);
        }
        for (name, def) in document.devices {
            let origin = def.origin.clone();
            let was = policy.devices.insert(name.clone(), def).map(|was| was.origin);
            replaced(&mut self.problems, "device", &name, &origin, was);
        }
        for (name, def) in document.vms {
            let origin = def.origin.clone();
            let was = policy.vms.insert(name.clone(), def).map(|was| was.origin);
            replaced(&mut self.problems, "VM", name.as_str(), &origin, was);
        }
        let [denies, assigns] = &mut self.rule_files;
        for rule in document.deny {
            let place = (rule.name.clone(), rule.origin.clone());
            let is_old = |old: &super::schema::DenyRule| old.name == rule.name;
            if rule_is_new(file, &place, denies, &mut self.problems, || {
                let at = policy.deny.iter().position(is_old)?;
                Some(policy.deny.remove(at).origin)
            }) {
                policy.deny.push(rule);
            }
        }
        for rule in document.assign {
            let place = (rule.name.clone(), rule.origin.clone());
            let is_old = |old: &super::schema::AssignRule| old.name == rule.name;
            if rule_is_new(file, &place, assigns, &mut self.problems, || {
                let at = policy.assign.iter().position(is_old)?;
                Some(policy.assign.remove(at).origin)
            }) {
                policy.assign.push(rule);
            }
        }
    }
}

/// Whether a rule is to be added: always, unless its own file has its name already. Takes out the one it replaces.
fn rule_is_new(
    file: usize,
    (name, origin): &(Option<String>, Origin),
    files: &mut BTreeMap<String, usize>,
    problems: &mut Vec<Problem>,
    take_old: impl FnOnce() -> Option<Origin>,
) -> bool {
    let Some(name) = name else { return true };
    match files.insert(name.clone(), file) {
        Some(other) if other == file => {
            let problem =
                Problem::new(Severity::Error, "duplicate", "another rule of this file has this name");
            problems.push(problem.at(origin).key(name.clone()));
            false
        }
        Some(_) => {
            replaced(problems, "rule", name, origin, take_old());
            true
        }
        None => true,
    }
}

fn replaced(problems: &mut Vec<Problem>, what: &str, name: &str, now: &Origin, was: Option<Origin>) {
    if let Some(was) = was {
        let message = format!("{what} {name:?} replaces the one at {was}");
        problems.push(Problem::new(Severity::Note, "replaced", message).at(now));
    }
}

/// Names that refer to nothing.
fn check_names(policy: &Policy, problems: &mut Vec<Problem>) {
    for rule in &policy.assign {
        for vm in &rule.vms {
            if !policy.vms.contains_key(vm) {
                let known: Vec<&str> = policy.vms.keys().map(|name| name.as_str()).collect();
                let origin = rule.vms_at.0.as_ref().unwrap_or(&rule.origin);
                problems.push(unknown("VM", "vms", vm.as_str(), &known, origin).key("vm"));
            }
        }
        check_match(policy, &rule.matches, &rule.origin, "match", problems);
    }
    for rule in &policy.deny {
        check_match(policy, &rule.matches, &rule.origin, "match", problems);
    }
    for (name, vm) in &policy.vms {
        for matches in &vm.deny {
            check_match(policy, matches, &vm.origin, &format!("vms.{name}.deny"), problems);
        }
    }
    for (name, device) in &policy.devices {
        check_match(policy, &device.matches, &device.origin, &format!("devices.{name}"), problems);
    }
    for matches in &policy.protect.keep_on_host {
        if let Some(origin) = &matches.spot.0 {
            check_match(policy, matches, origin, "protect.keep_on_host", problems);
        }
    }
}

fn check_match(policy: &Policy, matches: &Match, origin: &Origin, key: &str, problems: &mut Vec<Problem>) {
    let origin = matches.spot.0.as_ref().unwrap_or(origin);
    for name in &matches.device {
        if !policy.devices.contains_key(name) {
            let known: Vec<&str> = policy.devices.keys().map(String::as_str).collect();
            problems.push(unknown("device", "devices", name, &known, origin).key(format!("{key}.device")));
        }
    }
    for place in &matches.at {
        let PlaceRef::Named(name) = place else { continue };
        if !policy.connectors.contains_key(name) {
            let known: Vec<&str> = policy.connectors.keys().map(String::as_str).collect();
            problems.push(unknown("connector", "connectors", name, &known, origin).key(format!("{key}.at")));
        }
    }
    for not in &matches.not {
        check_match(policy, not, origin, &format!("{key}.not"), problems);
    }
}

fn unknown(what: &str, table: &str, name: &str, known: &[&str], origin: &Origin) -> Problem {
    let help = match closest(name, known) {
        Some(best) => format!("did you mean {best:?}? otherwise add [{table}.{name}]"),
        None => format!("add [{table}.{name}]"),
    };
    let message = format!("{what} {name:?} is not declared");
    Problem::new(Severity::Error, "undeclared", message).at(origin).help(help)
}

#[cfg(test)]
mod tests;
