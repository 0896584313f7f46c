//! Writes a policy as TOML that loads again and decides the same.

use std::fmt::{Display, Write as _};
use std::time::Duration;

use common::ids::VmName;

use super::condition::{connect_word, removable_word};
use super::schema::{
    AssignRule, ConnectorDef, Defaults, DenyRule, DeviceDef, Expect, Limits, Match, Policy, Protect, Revoke,
    SCHEMA_VERSION, Span, VmDef,
};

/// The whole policy. Tables with nothing but defaults are left out.
pub fn policy(policy: &Policy) -> String {
    let mut text = format!("schema = {SCHEMA_VERSION}\n");
    defaults(&policy.defaults, &mut text);
    protect(&policy.protect, &mut text);
    revoke(&policy.revoke, &mut text);
    for (name, def) in &policy.connectors {
        connector(name, def, &mut text);
    }
    for (name, def) in &policy.devices {
        device(name, def, &mut text);
    }
    for (name, def) in &policy.vms {
        vm(name, def, &mut text);
    }
    for rule in &policy.deny {
        deny(rule, &mut text);
    }
    for rule in &policy.assign {
        assign(rule, &mut text);
    }
    text
}

/// One `[[assign]]` table.
pub fn assign(rule: &AssignRule, text: &mut String) {
    let mut table = Table::open("[[assign]]", text);
    table.text("name", rule.name.as_deref());
    match rule.vms.as_slice() {
        [only] => table.put("vm", quoted(only.as_str())),
        several => table.list("vms", several, |vm| quoted(vm.as_str())),
    }
    table.put("match", inline(&match_pairs(&rule.matches)));
    table.word("mode", rule.mode);
    if rule.priority != 0 {
        table.put("priority", rule.priority);
    }
    if rule.preempt {
        table.put("preempt", true);
    }
    table.word("on_conflict", rule.on_conflict);
    table.word("on_release", rule.on_release);
    table.word("reset", rule.reset);
    if let Some(claim) = rule.claim_ports {
        table.put("claim_ports", claim);
    }
    if let Some(configuration) = rule.configuration {
        table.put("configuration", configuration);
    }
    table.span("follow", rule.follow);
    let expected = expect_pairs(&rule.expect);
    if !expected.is_empty() {
        table.put("expect", inline(&expected));
    }
    table.list("allow_in_use", &rule.allow_in_use, |kind| quoted(kind.as_str()));
    table.limits(&rule.limits);
}

/// A string in TOML's quotes.
pub fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A match as an inline table.
pub fn match_table(matches: &Match) -> String {
    inline(&match_pairs(matches))
}

fn deny(rule: &DenyRule, text: &mut String) {
    let mut table = Table::open("[[deny]]", text);
    table.text("name", rule.name.as_deref());
    table.text("reason", rule.reason.as_deref());
    table.put("match", inline(&match_pairs(&rule.matches)));
}

fn defaults(defaults: &Defaults, text: &mut String) {
    let usual = Defaults::default();
    if *defaults == usual {
        return;
    }
    let mut table = Table::open("[defaults]", text);
    table.word("mode", Some(defaults.mode).filter(|one| *one != usual.mode));
    table.word("on_conflict", Some(defaults.on_conflict).filter(|one| *one != usual.on_conflict));
    table.word("on_release", Some(defaults.on_release).filter(|one| *one != usual.on_release));
    table.word("reset", Some(defaults.reset).filter(|one| *one != usual.reset));
    if defaults.claim_ports != usual.claim_ports {
        table.put("claim_ports", defaults.claim_ports);
    }
    table.span("follow", defaults.follow);
    table.word("flap", defaults.flap);
}

fn protect(protect: &Protect, text: &mut String) {
    let usual = Protect::default();
    if *protect == usual {
        return;
    }
    let mut table = Table::open("[protect]", text);
    table.list("keep_on_host", &protect.keep_on_host, match_table);
    table.word("in_use", Some(protect.in_use).filter(|one| *one != usual.in_use));
}

fn revoke(revoke: &Revoke, text: &mut String) {
    let usual = Revoke::default();
    if *revoke == usual {
        return;
    }
    let mut table = Table::open("[revoke]", text);
    if revoke.hard {
        table.put("hard", true);
    }
    table.span("deadline", Some(revoke.deadline).filter(|one| *one != usual.deadline));
}

fn connector(name: &str, def: &ConnectorDef, text: &mut String) {
    let mut table = Table::open(&format!("[connectors.{name}]"), text);
    table.list("at", &def.at, |place| quoted(&place.to_string()));
    table.text("label", def.label.as_deref());
    if def.subtree {
        table.put("subtree", true);
    }
}

fn device(name: &str, def: &DeviceDef, text: &mut String) {
    let mut table = Table::open(&format!("[devices.{name}]"), text);
    for (key, value) in match_pairs(&def.matches) {
        table.put(&key, value);
    }
    table.list("also", &def.also, |id| quoted(&id.to_string()));
    table.text("label", def.label.as_deref());
}

fn vm(name: &VmName, def: &VmDef, text: &mut String) {
    let mut table = Table::open(&format!("[vms.{name}]"), text);
    table.text("label", def.label.as_deref());
    table.text("socket", def.socket.as_deref());
    if def.trust != 0 {
        table.put("trust", def.trust);
    }
    table.limits(&def.limits);
    table.list("deny", &def.deny, match_table);
}

/// Lines of one table.
struct Table<'t> {
    text: &'t mut String,
}

impl<'t> Table<'t> {
    fn open(head: &str, text: &'t mut String) -> Self {
        let _ = writeln!(text, "\n{head}");
        Self { text }
    }

    fn put(&mut self, key: &str, value: impl Display) {
        let _ = writeln!(self.text, "{key} = {value}");
    }

    fn text(&mut self, key: &str, value: Option<&str>) {
        if let Some(value) = value {
            self.put(key, quoted(value));
        }
    }

    fn word(&mut self, key: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.put(key, quoted(&value.to_string()));
        }
    }

    fn span(&mut self, key: &str, value: Option<Duration>) {
        self.word(key, value.map(Span));
    }

    fn list<T>(&mut self, key: &str, values: &[T], show: impl Fn(&T) -> String) {
        if !values.is_empty() {
            self.put(key, listed(values, show));
        }
    }

    fn limits(&mut self, limits: &Limits) {
        let mut pairs = Vec::new();
        pairs.extend(limits.max_devices.map(|most| ("max_devices".to_owned(), most.to_string())));
        pairs.extend(limits.flap.map(|flap| ("flap".to_owned(), quoted(&flap.to_string()))));
        if !pairs.is_empty() {
            self.put("limits", inline(&pairs));
        }
    }
}

type Pairs = Vec<(String, String)>;

fn inline(pairs: &Pairs) -> String {
    let all: Vec<String> = pairs.iter().map(|(key, value)| format!("{key} = {value}")).collect();
    format!("{{ {} }}", all.join(", "))
}

/// One value, or a list of several.
fn listed<T>(values: &[T], show: impl Fn(&T) -> String) -> String {
    match values {
        [only] => show(only),
        _ => format!("[{}]", values.iter().map(show).collect::<Vec<_>>().join(", ")),
    }
}

fn expect_pairs(expect: &Expect) -> Pairs {
    let mut pairs = Vec::new();
    add(&mut pairs, "id", &expect.id);
    add(&mut pairs, "serial", &expect.serial);
    add(&mut pairs, "fingerprint", &expect.fingerprint);
    pairs
}

fn add<T: Display>(pairs: &mut Pairs, key: &str, values: &[T]) {
    if !values.is_empty() {
        pairs.push((key.to_owned(), listed(values, |value| quoted(&value.to_string()))));
    }
}

fn match_pairs(matches: &Match) -> Pairs {
    let mut pairs = Vec::new();
    add(&mut pairs, "device", &matches.device);
    add(&mut pairs, "at", &matches.at);
    add(&mut pairs, "controller", &matches.controller);
    if !matches.depth.is_empty() {
        pairs.push(("depth".to_owned(), listed(&matches.depth, u8::to_string)));
    }
    add(&mut pairs, "id", &matches.id);
    add(&mut pairs, "serial", &matches.serial);
    add(&mut pairs, "fingerprint", &matches.fingerprint);
    add(&mut pairs, "product", &matches.product);
    add(&mut pairs, "manufacturer", &matches.manufacturer);
    add(&mut pairs, "class", &matches.class);
    add(&mut pairs, "interfaces.any", &matches.interfaces.any);
    add(&mut pairs, "interfaces.all", &matches.interfaces.all);
    add(&mut pairs, "interfaces.only", &matches.interfaces.only);
    add(&mut pairs, "interfaces.none", &matches.interfaces.none);
    add(&mut pairs, "interfaces.exactly", &matches.interfaces.exactly);
    add(&mut pairs, "speed", &matches.speed);
    let removable: Vec<&str> = matches.removable.iter().map(|one| removable_word(*one)).collect();
    add(&mut pairs, "removable", &removable);
    let connect_type: Vec<&str> = matches.connect_type.iter().map(|one| connect_word(*one)).collect();
    add(&mut pairs, "connect_type", &connect_type);
    if !matches.not.is_empty() {
        pairs.push(("not".to_owned(), listed(&matches.not, match_table)));
    }
    pairs
}
