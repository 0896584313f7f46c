//! The policies we ship, the messages for bad ones, and the output of the offline verbs, all through `usbpolicyctl`.
//!
//! Expected output lies in `tests/data`; `UPDATE_GOLDEN=1` writes it anew, to be read before it is committed.

#![expect(clippy::unwrap_used, reason = "a test says by a panic what went wrong")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

/// Runs `usbpolicyctl` in `dir`.
fn ctl(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_usbpolicyctl")).args(args).current_dir(dir).output().unwrap()
}

/// Standard output and exit status, as one text.
fn told(output: &Output) -> String {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    format!("{text}{errors}[exit status {}]\n", output.status.code().unwrap())
}

/// Compares with the file, or writes it.
fn golden(path: &Path, found: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(path, found).unwrap();
    }
    let wanted = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, wanted, "{} differs", path.display());
}

fn toml_files(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.ends_with(".toml")).collect();
    names.sort();
    names
}

#[test]
fn shipped_policies_are_clean() {
    let names = toml_files(&root().join("policies"));
    assert!(names.len() >= 6);
    for name in names.iter().filter(|name| *name != "eve-manifest.toml") {
        let output = ctl(&root().join("policies"), &["check", "--strict", name]);
        assert_eq!(told(&output), "1 file: all well\n[exit status 0]\n", "{name}");
    }
}

#[test]
fn policy_of_six_lines_in_the_manual_is_the_one_that_is_shipped() {
    let manual = fs::read_to_string(root().join("docs/user/policy.md")).unwrap();
    let example = manual.split("```").nth(1).and_then(|block| block.strip_prefix("toml\n")).unwrap();
    let shipped = fs::read_to_string(root().join("policies/one-stick.toml")).unwrap();
    assert_eq!(example.lines().count(), 6);
    assert!(shipped.ends_with(example));
}

#[test]
fn translated_eve_manifest_has_unstable_ports_and_nothing_else() {
    let snapshot = data().join("office-host.json");
    let args = ["check", "--json", "--devices", snapshot.to_str().unwrap(), "eve-manifest.toml"];
    let output = ctl(&root().join("policies"), &args);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let problems = report["problems"].as_array().unwrap();
    let codes: Vec<&str> = problems.iter().map(|one| one["code"].as_str().unwrap()).collect();
    let helps: Vec<&str> = problems.iter().map(|one| one["help"].as_str().unwrap()).collect();
    assert_eq!(codes, ["unstable-port", "unstable-port"]);
    assert_eq!(helps, ["write pci-0000:00:14.0/usb2:2.3", "write pci-0000:00:14.0/usb2:4"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn shipped_policies_decide_as_their_comments_say() {
    for name in toml_files(&root().join("policies")) {
        let policy = root().join("policies").join(&name);
        let args = ["plan", "--all", "--devices", "office-host.json", "--policy", policy.to_str().unwrap()];
        golden(&data().join("golden").join(name.replace(".toml", ".plan")), &told(&ctl(&data(), &args)));
    }
}

#[test]
fn bad_policies_are_refused_with_place_key_and_what_is_allowed() {
    let dir = data().join("bad");
    let names = toml_files(&dir);
    assert!(names.len() >= 20);
    for name in names {
        let output = ctl(&dir, &["check", &name]);
        assert_eq!(output.status.code(), Some(2), "{name}");
        golden(&dir.join(name.replace(".toml", ".expected")), &told(&output));
    }
}

#[test]
fn explain_shows_each_guard_rule_and_key() {
    for device in ["1-1", "1-2", "1-4", "1-4.1", "2-4", "1-11", "1-10"] {
        let office = root().join("policies/office.toml");
        let args = ["explain", device, "--devices", "office-host.json", "--policy", office.to_str().unwrap()];
        let output = told(&ctl(&data(), &args));
        assert!(output.lines().all(|line| line.chars().count() <= 80), "{output}");
        golden(&data().join(format!("golden/office-{device}.explain")), &output);
    }
}

#[test]
fn explain_all_shows_the_keys_of_every_rule() {
    let bench = root().join("policies/lab-bench.toml");
    let args =
        ["explain", "1-4.1", "--all", "--devices", "office-host.json", "--policy", bench.to_str().unwrap()];
    golden(&data().join("golden/lab-bench-1-4.1.explain"), &told(&ctl(&data(), &args)));
}

#[test]
fn diff_shows_what_changes_and_says_so_by_its_status() {
    let policies = root().join("policies");
    let snapshot = data().join("office-host.json");
    let snapshot = snapshot.to_str().unwrap();
    let same = ctl(&policies, &["diff", "office.toml", "office.toml", "--devices", snapshot]);
    assert_eq!(same.status.code(), Some(0));
    let output = ctl(&policies, &["diff", "office.toml", "lab-bench.toml", "--devices", snapshot]);
    golden(&data().join("golden/office-to-lab-bench.diff"), &told(&output));
}

#[test]
fn generated_policy_is_clean_and_gives_each_free_and_harmless_device_to_the_vm() {
    let output = ctl(&data(), &["generate", "--vm", "work", "--with-deny", "--devices", "office-host.json"]);
    golden(&data().join("golden/office-host.generate"), &told(&output));
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("policy.toml"), &output.stdout).unwrap();
    let check = ctl(dir.path(), &["check", "policy.toml"]);
    assert_eq!(told(&check), "1 file: all well\n[exit status 0]\n");
    let snapshot = data().join("office-host.json");
    let args = ["plan", "--json", "--devices", snapshot.to_str().unwrap(), "--policy", "policy.toml"];
    let plan: serde_json::Value = serde_json::from_slice(&ctl(dir.path(), &args).stdout).unwrap();
    let assigned = |device: &&serde_json::Value| device["new"]["verdict"] == "assign";
    assert_eq!(plan["devices"].as_array().unwrap().iter().filter(assigned).count(), 6);
}

#[test]
fn named_hub_stands_for_what_is_plugged_into_it() {
    let output = ctl(&data(), &["generate", "1-4", "2-4", "--vm", "lab", "--devices", "office-host.json"]);
    golden(&data().join("golden/hub.generate"), &told(&output));
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("policy.toml"), &output.stdout).unwrap();
    let snapshot = data().join("office-host.json");
    let args = ["plan", "--devices", snapshot.to_str().unwrap(), "--policy", "policy.toml"];
    golden(&data().join("golden/hub.plan"), &told(&ctl(dir.path(), &args)));
}

/// Runs each `$ ` line of the manual's session again. Only `usbpolicyctl`, with its output into a file or not, and
/// `cat` are there.
#[test]
fn session_in_the_manual_is_a_real_one() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(data().join("two-of-each.json"), dir.path().join("host.json")).unwrap();
    fs::create_dir(dir.path().join("policy.d")).unwrap();
    let manual = fs::read_to_string(root().join("docs/user/first-policy.md")).unwrap();
    let blocks: Vec<&str> =
        manual.split("```console\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 5);
    for block in blocks {
        let mut session = String::new();
        for command in block.lines().filter_map(|line| line.strip_prefix("$ ")) {
            session.push_str(&format!("$ {command}\n{}", typed(dir.path(), command)));
        }
        assert_eq!(session, block);
    }
}

/// What a command line prints.
fn typed(dir: &Path, command: &str) -> String {
    let (command, file) = command.split_once(" > ").map_or((command, None), |(a, b)| (a, Some(b)));
    let words: Vec<&str> = command.split(' ').collect();
    let (program, args) = words.split_first().unwrap();
    let printed = match *program {
        "cat" => fs::read(dir.join(args[0])).unwrap(),
        "usbpolicyctl" => ctl(dir, args).stdout,
        other => panic!("{other} is no command of this session"),
    };
    if let Some(file) = file {
        fs::write(dir.join(file), &printed).unwrap();
        return String::new();
    }
    String::from_utf8(printed).unwrap()
}

#[test]
fn json_has_a_schema_name_in_every_offline_verb() {
    let office = root().join("policies/office.toml");
    let office = office.to_str().unwrap();
    let devices = ["--devices", "office-host.json", "--json"];
    for (verb, rest) in [
        ("check", vec![office]),
        ("plan", vec!["--policy", office]),
        ("diff", vec![office, office]),
        ("explain", vec!["2-4", "--policy", office]),
    ] {
        let args: Vec<&str> = [verb].into_iter().chain(rest).chain(devices).collect();
        let value: serde_json::Value = serde_json::from_slice(&ctl(&data(), &args).stdout).unwrap();
        assert_eq!(value["schema"], format!("usbpolicyctl-{verb}/1"));
    }
}
