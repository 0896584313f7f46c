//! Reads one file of the policy into its tables. What the names in it refer to is not looked at here.

use common::ids::{IdError, VmName};
use toml::de::DeTable;

use super::parse_match::{device_match_keys, is_name, list, match_fields, match_or_name, match_table, place};
use super::problem::Problem;
use super::reader::{Fields, Node, Sink};
use super::schema::{
    ASSIGN_KEYS, AssignRule, CONNECTOR_KEYS, ConnectorDef, DEFAULTS_KEYS, DENY_KEYS, DEVICE_KEYS, Defaults,
    DenyRule, DeviceDef, EXPECT_KEYS, Expect, InUse, LIMITS_KEYS, Limits, Match, Mode, OnConflict, OnRelease,
    PROTECT_KEYS, Protect, REVOKE_KEYS, Reset, Revoke, SCHEMA_VERSION, Spot, TOP_KEYS, VM_KEYS, VmDef,
};
use crate::facts::HostUseKind;

/// The longest label or reason.
const LABEL_MAX: usize = 200;

/// The most ids in `also`.
const ALSO_MAX: usize = 16;

/// The most devices that a limit may name; a controller has 255 slots (xHCI 1.2 §5.3.3).
const DEVICES_MAX: i64 = 255;

/// The tables of one file. None for a table that is not there.
#[derive(Debug, Default)]
pub(super) struct Document {
    pub(super) defaults: Option<Defaults>,
    pub(super) protect: Option<Protect>,
    pub(super) revoke: Option<Revoke>,
    pub(super) connectors: Vec<(String, ConnectorDef)>,
    pub(super) devices: Vec<(String, DeviceDef)>,
    pub(super) vms: Vec<(VmName, VmDef)>,
    pub(super) deny: Vec<DenyRule>,
    pub(super) assign: Vec<AssignRule>,
}

/// Reads one file. With any error among the problems, the document is incomplete.
pub(super) fn parse_file(path: &str, text: &str) -> (Document, Vec<Problem>) {
    let mut sink = Sink::new(path, text);
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        sink.error("syntax", &span, "", error.message(), None);
    }
    if !sink.problems.is_empty() {
        return (Document::default(), sink.problems);
    }
    let top = Fields::new(table.get_ref(), 0..0, String::new(), &[TOP_KEYS], &mut sink);
    if top.is_empty() {
        return (Document::default(), sink.problems);
    }
    schema_version(&top, &mut sink);
    let document = Document {
        defaults: top.get("defaults").and_then(|node| defaults(&node, &mut sink)),
        protect: top.get("protect").and_then(|node| protect(&node, &mut sink)),
        revoke: top.get("revoke").and_then(|node| revoke(&node, &mut sink)),
        connectors: named(&top, "connectors", &mut sink, connector),
        devices: named(&top, "devices", &mut sink, device),
        vms: vms(&top, &mut sink),
        deny: rules(&top, "deny", &mut sink, deny),
        assign: rules(&top, "assign", &mut sink, assign),
    };
    (document, sink.problems)
}

fn schema_version(top: &Fields<'_, '_>, sink: &mut Sink<'_>) {
    let Some(node) = top.get("schema") else {
        let help = format!("write schema = {SCHEMA_VERSION} as the first line");
        sink.error("schema", &(0..0), "schema", "the version of the language is missing", Some(help));
        return;
    };
    if let Some(version) = node.integer(0, i64::MAX, sink).filter(|version| *version != SCHEMA_VERSION) {
        let help = format!("this usbpolicyd speaks schema {SCHEMA_VERSION}");
        sink.error("schema", &node.span(), "schema", format!("unknown schema {version}"), Some(help));
    }
}

fn defaults(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<Defaults> {
    let fields = node.table(&[DEFAULTS_KEYS], sink)?;
    let usual = Defaults::default();
    Some(Defaults {
        mode: word(&fields, "mode", Mode::WORDS, sink).unwrap_or(usual.mode),
        on_conflict: word(&fields, "on_conflict", OnConflict::WORDS, sink).unwrap_or(usual.on_conflict),
        on_release: word(&fields, "on_release", OnRelease::WORDS, sink).unwrap_or(usual.on_release),
        reset: word(&fields, "reset", Reset::WORDS, sink).unwrap_or(usual.reset),
        claim_ports: fields
            .get("claim_ports")
            .and_then(|node| node.boolean(sink))
            .unwrap_or(usual.claim_ports),
        follow: fields.get("follow").and_then(|node| node.duration(sink)),
        flap: fields.get("flap").and_then(|node| node.flap(sink)),
    })
}

fn protect(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<Protect> {
    let fields = node.table(&[PROTECT_KEYS], sink)?;
    Some(Protect {
        keep_on_host: list(&fields, "keep_on_host", sink, match_or_name),
        in_use: word(&fields, "in_use", InUse::WORDS, sink).unwrap_or(Protect::default().in_use),
    })
}

fn revoke(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<Revoke> {
    let fields = node.table(&[REVOKE_KEYS], sink)?;
    let usual = Revoke::default();
    Some(Revoke {
        hard: fields.get("hard").and_then(|node| node.boolean(sink)).unwrap_or(usual.hard),
        deadline: fields.get("deadline").and_then(|node| node.duration(sink)).unwrap_or(usual.deadline),
    })
}

fn connector(
    node: &Node<'_, '_>,
    span: &std::ops::Range<usize>,
    sink: &mut Sink<'_>,
) -> Option<ConnectorDef> {
    let fields = node.table(&[CONNECTOR_KEYS], sink)?;
    required(&fields, "at", "at = \"pci-0000:00:14.0/usb2:9\"", sink);
    Some(ConnectorDef {
        origin: sink.origin(span),
        at: list(&fields, "at", sink, |node, sink| {
            let place = place(node, sink)?;
            if let super::schema::PlaceRef::Named(name) = &place {
                let help = "a connector is made of ports, not of other connectors".to_owned();
                node.bad(sink, format!("{name:?} is not a port"), Some(help));
                return None;
            }
            Some(place)
        }),
        label: fields.get("label").and_then(|node| label(&node, sink)),
        subtree: fields.get("subtree").and_then(|node| node.boolean(sink)).unwrap_or(false),
    })
}

fn device(node: &Node<'_, '_>, span: &std::ops::Range<usize>, sink: &mut Sink<'_>) -> Option<DeviceDef> {
    let fields = node.table(&[DEVICE_KEYS, device_match_keys()], sink)?;
    let matches = match_fields(&fields, sink);
    let also = list(&fields, "also", sink, |node, sink| node.parsed(sink));
    if let Some(node) = fields.get("also").filter(|_| also.len() > ALSO_MAX) {
        node.bad(sink, format!("{} ids", also.len()), Some(format!("allowed: up to {ALSO_MAX}")));
    }
    if !device_match_keys().iter().any(|key| fields.has(key)) {
        sink.error(
            "bad-value",
            span,
            &fields.path,
            "nothing says how to know it",
            Some("add id or at".into()),
        );
    }
    Some(DeviceDef {
        origin: sink.origin(span),
        matches,
        also,
        label: fields.get("label").and_then(|node| label(&node, sink)),
    })
}

fn vms(top: &Fields<'_, '_>, sink: &mut Sink<'_>) -> Vec<(VmName, VmDef)> {
    let Some(names) = top.get("vms").and_then(|node| node.names(sink)) else { return Vec::new() };
    let mut all = Vec::new();
    for (name, span, node) in names.entries() {
        let parsed: Result<VmName, IdError> = name.parse();
        match parsed {
            Err(error) => sink.error("bad-name", &span, &node.path, error.to_string(), None),
            Ok(name) => {
                let Some(fields) = node.table(&[VM_KEYS], sink) else { continue };
                all.push((name, vm(&fields, &span, sink)));
            }
        }
    }
    all
}

fn vm(fields: &Fields<'_, '_>, span: &std::ops::Range<usize>, sink: &mut Sink<'_>) -> VmDef {
    let mut own = fields.get("limits").map(|node| limits(&node, sink)).unwrap_or_default();
    if let Some(node) = fields.get("max_devices") {
        if own.max_devices.is_some() {
            node.bad(sink, "limits.max_devices says it too", Some("keep one of the two".into()));
        }
        own.max_devices = max_devices(&node, sink);
    }
    VmDef {
        origin: sink.origin(span),
        label: fields.get("label").and_then(|node| label(&node, sink)),
        socket: fields.get("socket").and_then(|node| socket(&node, sink)),
        trust: fields.get("trust").and_then(|node| small(&node, 0, 100, sink)).unwrap_or(0),
        limits: own,
        deny: list(fields, "deny", sink, match_or_name),
    }
}

fn deny(fields: &Fields<'_, '_>, sink: &mut Sink<'_>) -> Option<DenyRule> {
    required(fields, "match", "match = { id = \"0781:5581\" }", sink);
    Some(DenyRule {
        origin: sink.origin(&fields.span),
        name: fields.get("name").and_then(|node| rule_name(&node, sink)),
        reason: fields.get("reason").and_then(|node| label(&node, sink)),
        matches: rule_match(fields, sink),
    })
}

fn assign(fields: &Fields<'_, '_>, sink: &mut Sink<'_>) -> Option<AssignRule> {
    required(fields, "match", "match = { at = \"pci-0000:00:14.0/usb2:9\" }", sink);
    let (one, many) = (fields.has("vm"), fields.has("vms"));
    if one && many {
        sink.error(
            "bad-value",
            &fields.span,
            &fields.key("vms"),
            "both vm and vms",
            Some("keep one of them".into()),
        );
    } else if !one && !many {
        let help = "add vm = \"name of the VM that gets the device\"";
        sink.error("missing-key", &fields.span, &fields.key("vm"), "no VM is named", Some(help.into()));
    }
    let mut read_vms = |key| list(fields, key, sink, |node, sink| node.parsed::<VmName>(sink));
    let mut vms = read_vms("vm");
    vms.extend(read_vms("vms"));
    let vms_at = fields.get("vm").or_else(|| fields.get("vms"));
    Some(AssignRule {
        origin: sink.origin(&fields.span),
        name: fields.get("name").and_then(|node| rule_name(&node, sink)),
        vms,
        vms_at: Spot(vms_at.map(|node| sink.origin(&node.span()))),
        matches: rule_match(fields, sink),
        mode: word(fields, "mode", Mode::WORDS, sink),
        priority: fields
            .get("priority")
            .and_then(|node| node.integer(-1000, 1000, sink))
            .and_then(|number| i32::try_from(number).ok())
            .unwrap_or(0),
        preempt: fields.get("preempt").and_then(|node| node.boolean(sink)).unwrap_or(false),
        on_conflict: word(fields, "on_conflict", OnConflict::WORDS, sink),
        on_release: word(fields, "on_release", OnRelease::WORDS, sink),
        reset: word(fields, "reset", Reset::WORDS, sink),
        claim_ports: fields.get("claim_ports").and_then(|node| node.boolean(sink)),
        configuration: fields.get("configuration").and_then(|node| small(&node, 1, 255, sink)),
        follow: fields.get("follow").and_then(|node| node.duration(sink)),
        expect: fields.get("expect").map(|node| expect(&node, sink)).unwrap_or_default(),
        allow_in_use: list(fields, "allow_in_use", sink, |node, sink| {
            let words: Vec<_> = HostUseKind::ALL.iter().map(|kind| (kind.as_str(), *kind)).collect();
            node.word(&words, sink)
        }),
        limits: fields.get("limits").map(|node| limits(&node, sink)).unwrap_or_default(),
    })
}

fn rule_match(fields: &Fields<'_, '_>, sink: &mut Sink<'_>) -> Match {
    fields.get("match").and_then(|node| match_table(&node, sink)).unwrap_or_default()
}

fn expect(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Expect {
    let Some(fields) = node.table(&[EXPECT_KEYS], sink) else { return Expect::default() };
    let id = list(&fields, "id", sink, |node, sink| node.parsed(sink));
    let serial = list(&fields, "serial", sink, |node, sink| {
        let text = node.text(sink)?;
        super::pattern::Glob::new(text, false).map_err(|error| node.bad(sink, error.to_string(), None)).ok()
    });
    let fingerprint = list(&fields, "fingerprint", sink, |node, sink| node.parsed(sink));
    Expect { id, serial, fingerprint }
}

fn limits(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Limits {
    let Some(fields) = node.table(&[LIMITS_KEYS], sink) else { return Limits::default() };
    Limits {
        max_devices: fields.get("max_devices").and_then(|node| max_devices(&node, sink)),
        flap: fields.get("flap").and_then(|node| node.flap(sink)),
    }
}

fn max_devices(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<u32> {
    node.integer(0, DEVICES_MAX, sink).and_then(|number| u32::try_from(number).ok())
}

fn small(node: &Node<'_, '_>, least: u8, most: u8, sink: &mut Sink<'_>) -> Option<u8> {
    node.integer(i64::from(least), i64::from(most), sink).and_then(|number| u8::try_from(number).ok())
}

/// An absolute path without `..`, short enough for `sockaddr_un`.
fn socket(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.text(sink)?;
    let clean = text.starts_with('/') && text.len() <= 107 && !text.split('/').any(|part| part == "..");
    if !clean || text.contains('\0') {
        let help =
            "an absolute path of at most 107 bytes without \"..\", like \"/run/usbvfiod/work/policy.sock\"";
        node.bad(sink, format!("{text:?} is not a path for a socket"), Some(help.into()));
        return None;
    }
    Some(text.to_owned())
}

fn label(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.text(sink)?;
    if text.chars().count() > LABEL_MAX || text.chars().any(char::is_control) {
        let help = format!("allowed: up to {LABEL_MAX} characters in one line");
        node.bad(sink, "too long, or with control characters", Some(help));
        return None;
    }
    Some(text.to_owned())
}

fn rule_name(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<String> {
    let text = node.text(sink)?;
    let clean = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !(1..=64).contains(&text.len()) || !text.bytes().all(clean) {
        let help = "1 to 64 letters, digits, '-', '_' and '.'";
        node.bad(sink, format!("{text:?} is not a name for a rule"), Some(help.into()));
        return None;
    }
    Some(text.to_owned())
}

fn word<T: Copy>(fields: &Fields<'_, '_>, key: &str, words: &[(&str, T)], sink: &mut Sink<'_>) -> Option<T> {
    fields.get(key).and_then(|node| node.word(words, sink))
}

fn required(fields: &Fields<'_, '_>, key: &str, example: &str, sink: &mut Sink<'_>) {
    if !fields.has(key) {
        sink.error("missing-key", &fields.span, &fields.key(key), "missing", Some(format!("like {example}")));
    }
}

fn named<T>(
    top: &Fields<'_, '_>,
    table: &str,
    sink: &mut Sink<'_>,
    mut one: impl FnMut(&Node<'_, '_>, &std::ops::Range<usize>, &mut Sink<'_>) -> Option<T>,
) -> Vec<(String, T)> {
    let Some(names) = top.get(table).and_then(|node| node.names(sink)) else { return Vec::new() };
    let mut all = Vec::new();
    for (name, span, node) in names.entries() {
        if !is_name(name) {
            let help = "1 to 64 letters, digits, '-' and '_', the first a letter".to_owned();
            sink.error("bad-name", &span, &node.path, format!("{name:?} is not a name"), Some(help));
        }
        all.extend(one(&node, &span, sink).map(|value| (name.to_owned(), value)));
    }
    all
}

fn rules<T>(
    top: &Fields<'_, '_>,
    table: &str,
    sink: &mut Sink<'_>,
    mut one: impl FnMut(&Fields<'_, '_>, &mut Sink<'_>) -> Option<T>,
) -> Vec<T> {
    let Some(node) = top.get(table) else { return Vec::new() };
    let keys = if table == "deny" { DENY_KEYS } else { ASSIGN_KEYS };
    let entries = node.array(&format!("[[{table}]] with two brackets"), sink);
    let mut all = Vec::new();
    for entry in entries {
        if let Some(fields) = entry.table(&[keys], sink) {
            all.extend(one(&fields, sink));
        }
    }
    all
}
