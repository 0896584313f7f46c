//! Finds the Debian archive that this machine already uses, so that no host name stands in our files.

use std::path::Path;

use anyhow::{Context, Result};

/// Suites of the main archive, by any of their names.
const SUITES: &[&str] =
    &["bookworm", "trixie", "forky", "duke", "sid", "oldstable", "stable", "testing", "unstable"];

/// One archive of apt's configuration that carries Debian itself.
#[derive(Debug, PartialEq, Eq)]
struct Candidate {
    uri: String,
    suites: Vec<String>,
    signed_by_debian: bool,
}

impl Candidate {
    /// Other projects also publish suites with Debian's names; these signs tell the real one.
    fn rank(&self) -> u32 {
        let has_updates = self.suites.iter().any(|suite| suite.ends_with("-updates"));
        2 * u32::from(self.signed_by_debian) + u32::from(has_updates)
    }
}

/// The URI of the Debian archive in the apt configuration below `etc_apt` (`/etc/apt`).
pub fn find(etc_apt: &Path) -> Result<String> {
    let mut candidates = Vec::new();
    let parts = std::fs::read_dir(etc_apt.join("sources.list.d")).into_iter().flatten().flatten();
    let mut files: Vec<_> = parts.map(|part| part.path()).collect();
    files.sort();
    files.insert(0, etc_apt.join("sources.list"));
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => candidates.extend(from_stanzas(&text)),
            Some("list") => candidates.extend(from_lines(&text)),
            _ => {}
        }
    }
    // The last of equals would win in `max_by_key`; apt prefers the first.
    let best = candidates.into_iter().rev().max_by_key(Candidate::rank);
    best.map(|candidate| candidate.uri).with_context(|| {
        format!(
            "no Debian archive in {0}/sources.list or {0}/sources.list.d: add one, as in sources.list(5)",
            etc_apt.display()
        )
    })
}

fn is_archive(uri: &str, suites: &[&str], components: &[&str]) -> bool {
    let reachable = ["http:", "https:", "file:", "copy:"].iter().any(|scheme| uri.starts_with(scheme));
    let is_debian = suites.iter().any(|suite| {
        let base = suite.trim_end_matches("-updates").trim_end_matches("-backports");
        SUITES.contains(&base)
    });
    reachable && is_debian && components.contains(&"main")
}

fn candidate(uri: &str, suites: &[&str], signed_by: &str) -> Candidate {
    Candidate {
        uri: uri.to_owned(),
        suites: suites.iter().map(|suite| (*suite).to_owned()).collect(),
        signed_by_debian: signed_by.contains("debian-archive-"),
    }
}

/// deb822 stanzas (`*.sources`).
fn from_stanzas(text: &str) -> Vec<Candidate> {
    let mut found = Vec::new();
    for stanza in text.split("\n\n") {
        let lines = || stanza.lines().filter(|line| !line.starts_with('#'));
        let field = |name: &str| {
            let value = lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.eq_ignore_ascii_case(name));
            value.map_or("", |(_, value)| value.trim())
        };
        let words = |name: &str| field(name).split_whitespace().collect::<Vec<_>>();
        if !words("Types").contains(&"deb") || field("Enabled").eq_ignore_ascii_case("no") {
            continue;
        }
        for uri in words("URIs") {
            if is_archive(uri, &words("Suites"), &words("Components")) {
                found.push(candidate(uri, &words("Suites"), field("Signed-By")));
            }
        }
    }
    found
}

/// One-line sources (`*.list`): `deb [options] uri suite component…`.
fn from_lines(text: &str) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ") else { continue };
        let rest = rest.trim_start();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (options, rest),
            None => ("", rest),
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        let [uri, suite, components @ ..] = words.as_slice() else { continue };
        if !is_archive(uri, &[suite], components) {
            continue;
        }
        let new = candidate(uri, &[suite], options);
        match found.iter_mut().find(|known| known.uri == new.uri) {
            Some(known) => known.suites.extend(new.suites),
            None => found.push(new),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_debian_stanza_wins_over_a_vendor_with_debian_suites() {
        let text = "Types: deb\nURIs: https://vendor.example/debian\nSuites: bookworm\nComponents: main\n\n\
            Types: deb\n# a remark: ignored\nURIs: http://mirror.example/debian\nSuites: bookworm bookworm-updates\n\
            Components: main contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
            Types: deb\nURIs: http://mirror.example/debian-security\nSuites: bookworm-security\nComponents: main\n";
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("sources.list.d")).unwrap();
        std::fs::write(directory.path().join("sources.list.d/debian.sources"), text).unwrap();
        assert_eq!(find(directory.path()).unwrap(), "http://mirror.example/debian");
    }

    #[test]
    fn a_one_line_file_is_understood() {
        let text = "# deb http://old.example/debian bookworm main\n\
            deb [arch=amd64] https://other.example/apt stable tools\n\
            deb http://mirror.example/debian trixie main non-free-firmware # comment\n\
            deb-src http://mirror.example/debian trixie main\n\
            deb http://mirror.example/debian trixie-updates main\n";
        let found = from_lines(text);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].suites, ["trixie", "trixie-updates"]);
    }

    #[test]
    fn without_an_archive_the_message_names_the_place() {
        let directory = tempfile::tempdir().unwrap();
        let message = find(directory.path()).unwrap_err().to_string();
        assert!(message.contains("sources.list"), "{message}");
    }
}
