//! The man pages say what the programs do: each option, verb, key and word is in its page, and none that is gone.

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use usbpolicyd::policy::load::{Layer, Source, load};
use usbpolicyd::policy::schema;

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man")
}

fn page(name: &str) -> String {
    fs::read_to_string(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Arguments of a macro line: words, without the separators and font macros of mdoc.
fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split_whitespace().filter(|word| !matches!(*word, "," | "|" | "." | ":" | "Ns" | "="))
}

/// Long options that a page describes or mentions: what stands after `Fl` with a dash more.
fn options_of_page(page: &str) -> BTreeSet<String> {
    let mut options = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with('.') && !line.starts_with(".B")) {
        for word in words(line) {
            if let Some(long) = word.strip_prefix('-').filter(|long| long.len() > 1) {
                options.insert(long.to_owned());
            }
        }
    }
    options
}

/// Long options of a program and of all its verbs.
fn options_of_program(program: &clap::Command) -> BTreeSet<String> {
    let own =
        program.get_arguments().filter(|option| !option.is_hide_set()).filter_map(|option| option.get_long());
    let mut options: BTreeSet<String> = own.map(str::to_owned).collect();
    for verb in program.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        options.extend(options_of_program(verb));
    }
    options
}

/// The pages as they are installed.
fn made() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_packaging")).arg(directory.path()).status().unwrap();
    assert!(status.success());
    directory
}

#[test]
fn options_of_page_and_program_are_the_same() {
    let made = made();
    for (mut program, section) in packaging::programs() {
        program.build();
        let name = format!("{}.{section}", program.get_name());
        let page = fs::read_to_string(made.path().join("man").join(&name)).unwrap();
        let (mut described, mut real) = (options_of_page(&page), options_of_program(&program));
        for common in ["help", "version"] {
            described.remove(common);
            real.remove(common);
        }
        assert_eq!(described, real, "{name}: left what the page says, right what the program takes");
    }
}

#[test]
fn every_verb_is_in_the_page() {
    let text = fs::read_to_string(made().path().join("man/usbpolicyctl.1")).unwrap();
    let mut verbs = 0;
    let (program, _) = packaging::programs().remove(0);
    for verb in program.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        assert!(text.contains(&format!("\n.Ss {}", verb.get_name())), "{}", verb.get_name());
        verbs += 1;
    }
    assert!(verbs > 5);
}

/// Keys that the page of the policy describes, by the heading they stand under.
fn keys_of_page(page: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut keys: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut heading = String::new();
    for line in page.lines() {
        if let Some(name) = line.strip_prefix(".Ss ") {
            heading = name.to_owned();
        } else if line.starts_with(".Sh ") {
            heading.clear();
        } else if let Some(names) = line.strip_prefix(".It Ic ") {
            keys.entry(heading.clone()).or_default().extend(words(names).map(str::to_owned));
        }
    }
    keys
}

#[test]
fn keys_of_the_policy_page_and_of_the_language_are_the_same() {
    let expected = [
        ("Top", schema::TOP_KEYS),
        ("[defaults]", schema::DEFAULTS_KEYS),
        ("[protect]", schema::PROTECT_KEYS),
        ("[revoke]", schema::REVOKE_KEYS),
        ("[connectors.NAME]", schema::CONNECTOR_KEYS),
        ("[devices.NAME]", schema::DEVICE_KEYS),
        ("[vms.NAME]", schema::VM_KEYS),
        ("[[deny]]", schema::DENY_KEYS),
        ("[[assign]]", schema::ASSIGN_KEYS),
        ("limits", schema::LIMITS_KEYS),
        ("expect", schema::EXPECT_KEYS),
        ("match", schema::MATCH_KEYS),
        ("interfaces", schema::INTERFACES_KEYS),
    ];
    let expected: BTreeMap<String, BTreeSet<String>> = expected
        .iter()
        .map(|(heading, keys)| ((*heading).to_owned(), keys.iter().map(|key| (*key).to_owned()).collect()))
        .collect();
    assert_eq!(keys_of_page(&page("usbpolicyd.toml.5")), expected);
}

#[test]
fn words_of_the_language_are_in_the_policy_page() {
    let text = page("usbpolicyd.toml.5");
    let described: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix(".Cm ")).flat_map(words).collect();
    let mut expected: Vec<&str> = Vec::new();
    expected.extend(schema::Mode::WORDS.iter().map(|(word, _)| *word));
    expected.extend(schema::OnConflict::WORDS.iter().map(|(word, _)| *word));
    expected.extend(schema::OnRelease::WORDS.iter().map(|(word, _)| *word));
    expected.extend(schema::Reset::WORDS.iter().map(|(word, _)| *word));
    expected.extend(schema::InUse::WORDS.iter().map(|(word, _)| *word));
    expected.extend(usbpolicyd::facts::HostUseKind::ALL.map(usbpolicyd::facts::HostUseKind::as_str));
    for word in expected {
        assert!(described.contains(word), "{word}");
    }
}

/// The literal blocks of a page.
fn examples(page: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut block: Option<String> = None;
    for line in page.lines() {
        if line.starts_with(".Bd -literal") {
            block = Some(String::new());
        } else if line == ".Ed" {
            blocks.extend(block.take());
        } else if let Some(block) = &mut block {
            block.push_str(line);
            block.push('\n');
        }
    }
    blocks
}

#[test]
fn policies_in_the_pages_load() {
    for name in ["usbpolicyd.8", "usbpolicyd.toml.5"] {
        let policies: Vec<String> =
            examples(&page(name)).into_iter().filter(|block| block.starts_with("schema")).collect();
        assert_eq!(policies.len(), 1, "{name}");
        for text in policies {
            let source = Source { layer: Layer::Main, path: name.to_owned(), text };
            let loaded = load(&[source]).unwrap_or_else(|problems| panic!("{name}: {problems:?}"));
            assert!(!loaded.policy.assign.is_empty());
        }
    }
}

#[test]
fn messages_of_the_protocol_page_are_those_of_its_table() {
    let table = fs::read_to_string(directory().join("../../docs/protocol.md")).unwrap();
    let (channel, _) = table.split_once("`code` of `refused`").unwrap();
    let real: BTreeSet<&str> = channel
        .lines()
        .skip_while(|line| !line.starts_with("### "))
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let text = page("usbpolicyd-protocol.7");
    let described: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix(".It Cm ")?.split_whitespace().next()).collect();
    assert!(real.len() > 10);
    assert_eq!(described, real, "left what the page says, right what docs/protocol.md says");
}

#[test]
fn groff_finds_no_fault_in_any_page() {
    let (made, mut pages) = (made(), 0);
    for entry in fs::read_dir(made.path().join("man")).unwrap() {
        let path = entry.unwrap().path();
        let output = Command::new("groff")
            .args(["-mandoc", "-ww", "-Tutf8"])
            .arg(&path)
            .output()
            .unwrap_or_else(|error| panic!("groff: {error}; `make setup` installs it"));
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{}: {said}", path.display());
        assert!(!output.stdout.is_empty());
        pages += 1;
    }
    assert_eq!(pages, 6);
}

#[test]
fn completions_know_every_verb_and_option() {
    let directory = made();
    for (mut program, _) in packaging::programs() {
        program.build();
        let name = program.get_name().to_owned();
        let text = fs::read_to_string(directory.path().join("bash").join(format!("{name}.bash"))).unwrap();
        for option in options_of_program(&program) {
            assert!(text.contains(&format!("--{option}")), "{name} --{option}");
        }
        assert!(directory.path().join(format!("zsh/_{name}")).exists());
        assert!(directory.path().join(format!("fish/{name}.fish")).exists());
    }
}
