//! The documents say what is: tests and files they name exist, messages they quote are the programs' own.

#![expect(clippy::unwrap_used, reason = "a test says by its panic what went wrong")]

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document(path: &str) -> String {
    fs::read_to_string(repository().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// All Rust sources of the workspace, one after another.
fn sources() -> String {
    fn collect(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut text = String::new();
    for package in ["common", "usbpolicyd", "usbvfiod", "vm-tests", "packaging"] {
        for below in ["src", "tests"] {
            let directory = repository().join(package).join(below);
            if directory.is_dir() {
                collect(&directory, &mut text);
            }
        }
    }
    text
}

/// What stands between backticks, code blocks left out.
fn quoted(document: &str) -> Vec<String> {
    let mut in_block = false;
    let mut found = Vec::new();
    for line in document.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

#[test]
fn tests_and_files_that_the_threat_model_names_exist() {
    let sources = sources();
    let (mut tests, mut files) = (0, 0);
    for name in quoted(&document("docs/threat-model.md")) {
        let is_word =
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if is_word && name.matches('_').count() >= 2 && !name.starts_with("no_new") {
            assert!(sources.contains(&format!("fn {name}(")), "no test {name}");
            tests += 1;
        } else if ["common/", "usbpolicyd/", "usbvfiod/", "packaging/", "vm-tests/"]
            .iter()
            .any(|package| name.starts_with(package))
        {
            assert!(repository().join(&name).exists(), "no file {name}");
            files += 1;
        }
    }
    assert!(tests > 30 && files > 5, "{tests} tests, {files} files");
}

#[test]
fn each_hostile_input_has_a_test_that_exists() {
    let sources = sources();
    let lines = [
        ("R", 8),
        ("I", 6),
        ("C", 5),
        ("T", 5),
        ("F", 8),
        ("M", 3),
        ("D", 5),
        ("P", 3),
        ("K", 8),
        ("G", 5),
        ("S", 13),
        ("O", 5),
    ];
    let page = document("docs/developer/hostile-inputs.md");
    for (group, count) in lines {
        for number in 1..=count {
            let start = format!("| {group}{number} |");
            let row = page.lines().find(|line| line.starts_with(&start));
            let row = row.unwrap_or_else(|| panic!("no line {group}{number}"));
            let tests = quoted(row);
            assert!(!tests.is_empty(), "{group}{number} names no test");
            for name in tests {
                assert!(sources.contains(&format!("fn {name}(")), "{group}{number}: no test {name}");
            }
        }
    }
}

/// Sources with the string literals that go over several lines joined as the compiler does.
fn with_joined_literals(sources: &str) -> String {
    let mut joined = String::with_capacity(sources.len());
    for line in sources.lines() {
        let line = if joined.ends_with('\u{1}') {
            joined.pop();
            line.trim_start()
        } else {
            line
        };
        match line.strip_suffix('\\') {
            Some(start) => {
                joined.push_str(start);
                joined.push('\u{1}');
            }
            None => {
                joined.push_str(line);
                joined.push('\n');
            }
        }
    }
    joined
}

#[test]
fn messages_in_troubleshooting_are_those_of_the_programs() {
    let sources = with_joined_literals(&sources());
    let mut messages = 0;
    for line in document("docs/user/troubleshooting.md").lines().filter(|line| line.starts_with("| `")) {
        let cell = line.trim_start_matches("| ").split(" | ").next().unwrap_or_default();
        for message in cell.split('`').skip(1).step_by(2) {
            for part in message.split('…').map(|part| part.trim_matches([' ', ',', ';', ':'])) {
                if part.len() > 2 {
                    assert!(sources.contains(part), "nobody says {part:?} ({message:?})");
                }
            }
            messages += 1;
        }
    }
    assert!(messages > 35, "{messages} messages");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut links = 0;
    for name in
        ["docs/threat-model.md", "docs/user/install.md", "docs/user/vmm.md", "docs/user/troubleshooting.md"]
    {
        let text = document(name);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            if file.starts_with("http") {
                continue;
            }
            let path = repository().join(name).parent().unwrap().join(file);
            let path = if file.is_empty() { repository().join(name) } else { path };
            if path.is_dir() {
                links += 1;
                continue;
            }
            let linked =
                fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {target}: {error}"));
            let heading = |line: &str| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-");
            let has = linked.lines().filter(|line| line.starts_with('#')).any(|line| heading(line) == place);
            assert!(place.is_empty() || has, "{name}: no heading for {target}");
            links += 1;
        }
    }
    assert!(links > 8);
}
