//! The JSON Schema for editors and the parser know the same keys, words and names.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test says by a panic what went wrong")]

use std::collections::BTreeSet;
use std::fmt::Display;

use serde_json::Value;
use usbpolicyd::facts::HostUseKind;
use usbpolicyd::policy::pattern::CLASS_NAMES;
use usbpolicyd::policy::schema::{self, InUse, Mode, OnConflict, OnRelease, Reset};

fn json() -> Value {
    serde_json::from_str(include_str!("../../docs/user/policy.schema.json")).unwrap()
}

fn keys(json: &Value, at: &str) -> BTreeSet<String> {
    json.pointer(at).and_then(Value::as_object).expect(at).keys().cloned().collect()
}

fn words<T: Display>(all: &[(&str, T)]) -> Vec<String> {
    all.iter().map(|(word, _)| (*word).to_owned()).collect()
}

fn listed(json: &Value, at: &str) -> Vec<String> {
    let list = json.pointer(at).and_then(Value::as_array).expect(at);
    list.iter().map(|one| one.as_str().unwrap().to_owned()).collect()
}

#[test]
fn tables_have_the_same_keys() {
    let json = json();
    let without =
        |one: &str| schema::MATCH_KEYS.iter().copied().filter(|key| *key != one).collect::<Vec<_>>();
    let device: Vec<&str> = schema::DEVICE_KEYS.iter().copied().chain(without("device")).collect();
    for (at, wanted) in [
        ("/properties", schema::TOP_KEYS),
        ("/properties/defaults/properties", schema::DEFAULTS_KEYS),
        ("/properties/protect/properties", schema::PROTECT_KEYS),
        ("/properties/revoke/properties", schema::REVOKE_KEYS),
        ("/$defs/connector/properties", schema::CONNECTOR_KEYS),
        ("/$defs/device/properties", &device),
        ("/$defs/vm/properties", schema::VM_KEYS),
        ("/$defs/deny/properties", schema::DENY_KEYS),
        ("/$defs/assign/properties", schema::ASSIGN_KEYS),
        ("/$defs/match/properties", schema::MATCH_KEYS),
        ("/$defs/notMatch/properties", &without("not")),
        ("/$defs/interfaces/properties", schema::INTERFACES_KEYS),
        ("/$defs/limits/properties", schema::LIMITS_KEYS),
        ("/$defs/expect/properties", schema::EXPECT_KEYS),
    ] {
        let wanted: BTreeSet<String> = wanted.iter().map(|key| (*key).to_owned()).collect();
        assert_eq!(keys(&json, at), wanted, "{at}");
    }
}

#[test]
fn words_are_the_same() {
    let json = json();
    for (key, wanted) in [
        ("mode", words(Mode::WORDS)),
        ("on_conflict", words(OnConflict::WORDS)),
        ("on_release", words(OnRelease::WORDS)),
        ("reset", words(Reset::WORDS)),
    ] {
        assert_eq!(listed(&json, &format!("/properties/defaults/properties/{key}/enum")), wanted, "{key}");
        assert_eq!(listed(&json, &format!("/$defs/assign/properties/{key}/enum")), wanted, "{key}");
    }
    assert_eq!(listed(&json, "/properties/protect/properties/in_use/enum"), words(InUse::WORDS));
    let classes: Vec<String> = CLASS_NAMES.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(listed(&json, "/$defs/class/anyOf/0/enum"), classes);
    let uses: Vec<String> = HostUseKind::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(listed(&json, "/$defs/assign/properties/allow_in_use/oneOf/0/enum"), uses);
}

#[test]
fn every_table_of_the_schema_refuses_unknown_keys() {
    fn look(value: &Value, path: &str) {
        if let Some(table) = value.as_object() {
            if table.contains_key("properties") {
                assert_eq!(table.get("additionalProperties"), Some(&Value::Bool(false)), "{path}");
            }
            table.iter().for_each(|(key, value)| look(value, &format!("{path}/{key}")));
        }
    }
    look(&json(), "");
}

#[test]
fn manual_names_every_key() {
    let manual = include_str!("../../docs/user/policy.md");
    let tables = [
        schema::DEFAULTS_KEYS,
        schema::PROTECT_KEYS,
        schema::REVOKE_KEYS,
        schema::CONNECTOR_KEYS,
        schema::DEVICE_KEYS,
        schema::VM_KEYS,
        schema::DENY_KEYS,
        schema::ASSIGN_KEYS,
        schema::MATCH_KEYS,
        schema::LIMITS_KEYS,
        schema::EXPECT_KEYS,
    ];
    for key in tables.into_iter().flatten() {
        assert!(manual.contains(&format!("`{key}`")), "docs/user/policy.md does not tell of `{key}`");
    }
    for key in schema::INTERFACES_KEYS {
        assert!(
            manual.contains(&format!("`interfaces.{key}`")),
            "docs/user/policy.md does not tell of {key}"
        );
    }
    for (name, _) in CLASS_NAMES {
        assert!(manual.contains(&format!("`{name}`")), "docs/user/policy.md does not tell of class {name}");
    }
}
