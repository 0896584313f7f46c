//! Reads match tables: `match`, `not`, `[devices.NAME]`, `keep_on_host` and a VM's `deny`.

use common::ids::Speed;

use super::pattern::{CLASS_NAMES, ClassSet, Glob};
use super::reader::{Fields, Node, Sink, suggestion};
use super::schema::{INTERFACES_KEYS, Interfaces, MATCH_KEYS, Match, PlaceRef, Spot};
use crate::facts::{ConnectType, Removable};
use crate::topology::{KernelName, PlaceError};

/// The most entries that a list in a match may have.
const LIST_MAX: usize = 256;

/// The most hubs between a root port and a device (USB 2.0 §4.1.1: seven tiers).
const DEPTH_MAX: u8 = 6;

const SPEEDS: &[(&str, Speed)] = &[
    ("low", Speed::Low),
    ("full", Speed::Full),
    ("high", Speed::High),
    ("super", Speed::Super),
    ("super-plus", Speed::SuperPlus),
];

const REMOVABLE: &[(&str, Removable)] =
    &[("removable", Removable::Removable), ("fixed", Removable::Fixed), ("unknown", Removable::Unknown)];

const CONNECT_TYPES: &[(&str, ConnectType)] = &[
    ("hotplug", ConnectType::Hotplug),
    ("hardwired", ConnectType::Hardwired),
    ("not-used", ConnectType::NotUsed),
    ("unknown", ConnectType::Unknown),
];

/// Keys of `[devices.NAME]` that are a match: all but `device`.
pub(super) fn device_match_keys() -> &'static [&'static str] {
    MATCH_KEYS.strip_prefix(&["device"]).unwrap_or(MATCH_KEYS)
}

/// Keys of `not`: all but `not`.
fn not_keys() -> &'static [&'static str] {
    MATCH_KEYS.strip_suffix(&["not"]).unwrap_or(MATCH_KEYS)
}

/// A match table, or `"@name"` for a device from `[devices]`.
pub(super) fn match_or_name(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<Match> {
    if node.is_table() {
        return match_table(node, sink);
    }
    let text = node.text(sink)?;
    let Some(name) = text.strip_prefix('@') else {
        let help = "\"@name\" for a device from [devices], or a table like { id = \"1050:*\" }";
        node.bad(sink, format!("{text:?} is not a match"), Some(help.into()));
        return None;
    };
    let spot = Spot(Some(sink.origin(&node.span())));
    Some(Match { spot, device: vec![name.to_owned()], ..Match::default() })
}

/// A match table that must say something.
pub(super) fn match_table(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<Match> {
    let fields = node.table(&[MATCH_KEYS], sink)?;
    let matches = match_fields(&fields, sink);
    if fields.is_empty() {
        let help = "to mean every device, write id = \"*:*\"";
        sink.error("bad-value", &fields.span, &fields.path, "an empty match", Some(help.into()));
    }
    Some(matches)
}

/// The match keys of a table that may have others beside.
pub(super) fn match_fields(fields: &Fields<'_, '_>, sink: &mut Sink<'_>) -> Match {
    let class_set = |node: &Node<'_, '_>, sink: &mut Sink<'_>| class(node, sink);
    let fold = |node: &Node<'_, '_>, sink: &mut Sink<'_>| glob(node, true, sink);
    let matches = Match {
        spot: Spot(Some(sink.origin(&fields.span))),
        device: list(fields, "device", sink, |node, sink| {
            let text = node.text(sink)?;
            Some(text.strip_prefix('@').unwrap_or(text).to_owned())
        }),
        at: list(fields, "at", sink, place),
        controller: list(fields, "controller", sink, |node, sink| node.parsed(sink)),
        depth: spread(fields, "depth", sink, depths),
        id: list(fields, "id", sink, |node, sink| node.parsed(sink)),
        serial: list(fields, "serial", sink, |node, sink| glob(node, false, sink)),
        fingerprint: list(fields, "fingerprint", sink, |node, sink| node.parsed(sink)),
        product: list(fields, "product", sink, fold),
        manufacturer: list(fields, "manufacturer", sink, fold),
        class: list(fields, "class", sink, class_set),
        interfaces: fields.get("interfaces").map(|node| interfaces(&node, sink)).unwrap_or_default(),
        speed: spread(fields, "speed", sink, speeds),
        removable: list(fields, "removable", sink, |node, sink| node.word(REMOVABLE, sink)),
        connect_type: list(fields, "connect_type", sink, |node, sink| node.word(CONNECT_TYPES, sink)),
        not: match fields.get("not") {
            Some(node) => nots(&node, sink),
            None => Vec::new(),
        },
    };
    if fields.has("serial") && !fields.has("id") && !fields.has("device") {
        let at = fields.get("serial").map_or(fields.span.clone(), |node| node.span());
        let help = "add id = \"vvvv:pppp\": serial numbers are unique for one product only";
        sink.error("bad-value", &at, &fields.key("serial"), "serial without id", Some(help.into()));
    }
    matches
}

fn nots(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Vec<Match> {
    let mut all: Vec<Match> = Vec::new();
    for entry in node.one_or_more(sink) {
        let Some(fields) = entry.table(&[not_keys()], sink) else { continue };
        if fields.is_empty() {
            sink.error("bad-value", &fields.span, &fields.path, "an empty match", None);
        }
        all.push(match_fields(&fields, sink));
    }
    all.sort();
    all.dedup();
    all
}

fn interfaces(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Interfaces {
    let Some(fields) = node.table(&[INTERFACES_KEYS], sink) else { return Interfaces::default() };
    if fields.is_empty() {
        node.bad(sink, "no test is named", Some(suggestion("", INTERFACES_KEYS)));
    }
    let mut read = |key| list(&fields, key, sink, class);
    Interfaces {
        any: read("any"),
        all: read("all"),
        only: read("only"),
        none: read("none"),
        exactly: read("exactly"),
    }
}

/// A sorted list without doubles; a single value counts as a list of one.
pub(super) fn list<T: Ord>(
    fields: &Fields<'_, '_>,
    key: &str,
    sink: &mut Sink<'_>,
    mut one: impl FnMut(&Node<'_, '_>, &mut Sink<'_>) -> Option<T>,
) -> Vec<T> {
    spread(fields, key, sink, |node, sink| one(node, sink).into_iter().collect())
}

/// The same where one entry may stand for several values.
fn spread<T: Ord>(
    fields: &Fields<'_, '_>,
    key: &str,
    sink: &mut Sink<'_>,
    mut many: impl FnMut(&Node<'_, '_>, &mut Sink<'_>) -> Vec<T>,
) -> Vec<T> {
    let Some(node) = fields.get(key) else { return Vec::new() };
    let entries = node.one_or_more(sink);
    if entries.len() > LIST_MAX {
        node.bad(sink, format!("{} entries", entries.len()), Some(format!("allowed: up to {LIST_MAX}")));
        return Vec::new();
    }
    let mut values: Vec<T> = entries.iter().flat_map(|entry| many(entry, sink)).collect();
    values.sort();
    values.dedup();
    values
}

fn glob(node: &Node<'_, '_>, fold_case: bool, sink: &mut Sink<'_>) -> Option<Glob> {
    let text = node.text(sink)?;
    Glob::new(text, fold_case).map_err(|error| node.bad(sink, error.to_string(), None)).ok()
}

fn class(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<ClassSet> {
    let text = node.text(sink)?;
    let names: Vec<&str> = CLASS_NAMES.iter().map(|(name, _)| *name).collect();
    let help = || Some(suggestion(text, &names));
    text.parse().map_err(|error: super::pattern::PatternError| node.bad(sink, error.to_string(), help())).ok()
}

/// A place in any of its forms.
pub(super) fn place(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Option<PlaceRef> {
    let text = node.text(sink)?;
    let numbered = text.starts_with(|one: char| one.is_ascii_digit());
    let parsed = if text.contains('/') {
        text.parse().map(PlaceRef::Port)
    } else if numbered && text.contains('-') {
        text.parse().map(PlaceRef::Kernel)
    } else if let (true, Some((bus, chain))) = (numbered, text.split_once(':')) {
        let name = format!("{bus}-{chain}").parse::<KernelName>();
        name.map(PlaceRef::Eve).map_err(|_| PlaceError::Kernel(text.to_owned()))
    } else if is_name(text) {
        Ok(PlaceRef::Named(text.to_owned()))
    } else {
        Err(PlaceError::Port(text.to_owned()))
    };
    let help = "a port \"pci-0000:00:14.0/usb2:9.1\", a kernel name \"3-9.1\", bus and port \"003:9.1\", \
                or a name from [connectors]";
    parsed.map_err(|error| node.bad(sink, error.to_string(), Some(help.into()))).ok()
}

/// Whether this can be the name of a connector or device. It starts with a letter, so that no address is a name.
pub(super) fn is_name(text: &str) -> bool {
    let clean = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    (1..=64).contains(&text.len())
        && text.starts_with(|one: char| one.is_ascii_alphabetic())
        && text.bytes().all(clean)
}

/// `high`, `>=high`, `<super`.
fn speeds(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Vec<Speed> {
    let Some(text) = node.text(sink) else { return Vec::new() };
    let (compare, word) = comparison(text);
    let Some((_, limit)) = SPEEDS.iter().find(|(name, _)| *name == word) else {
        let names: Vec<&str> = SPEEDS.iter().map(|(name, _)| *name).collect();
        let help = format!("{}; also with >=, <=, > or < in front", suggestion(word, &names));
        node.bad(sink, format!("{text:?} is not a speed"), Some(help));
        return Vec::new();
    };
    SPEEDS.iter().map(|(_, speed)| *speed).filter(|speed| compare(&speed.cmp(limit))).collect()
}

/// `2`, `">=1"`.
fn depths(node: &Node<'_, '_>, sink: &mut Sink<'_>) -> Vec<u8> {
    let Some(text) = node.as_str() else {
        let number = node.integer(0, i64::from(DEPTH_MAX), sink);
        return number.and_then(|number| u8::try_from(number).ok()).into_iter().collect();
    };
    let (compare, number) = comparison(text);
    let limit = number.parse::<u8>().ok().filter(|limit| !number.starts_with('+') && *limit <= DEPTH_MAX);
    let values =
        limit.map(|limit| (0..=DEPTH_MAX).filter(|depth| compare(&depth.cmp(&limit))).collect::<Vec<_>>());
    values.filter(|values| !values.is_empty()).unwrap_or_else(|| {
        let help = format!("0 to {DEPTH_MAX} hubs, or \">=1\" and the like");
        node.bad(sink, format!("{text:?} is not a depth that exists"), Some(help));
        Vec::new()
    })
}

type Compare = fn(&std::cmp::Ordering) -> bool;

fn comparison(text: &str) -> (Compare, &str) {
    let operators: [(&str, Compare); 4] =
        [(">=", |it| it.is_ge()), ("<=", |it| it.is_le()), (">", |it| it.is_gt()), ("<", |it| it.is_lt())];
    for (operator, compare) in operators {
        if let Some(rest) = text.strip_prefix(operator) {
            return (compare, rest.trim_start());
        }
    }
    (|it| it.is_eq(), text)
}
