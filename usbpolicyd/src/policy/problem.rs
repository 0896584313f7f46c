//! What is wrong with a policy, where, and what would be right.

use std::fmt;

use serde::{Serialize, Serializer};

use super::load::Source;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// The policy works, though hardly as meant.
    Warning,
    /// The policy cannot be used.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// A place in a file of the policy. Lines and columns count from 1, columns in characters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Origin {
    /// Path of the file as it was given.
    pub file: String,
    /// Line, 1 for the first.
    pub line: u32,
    /// Column, 1 for the first character.
    pub column: u32,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file, self.line, self.column)
    }
}

/// The line of the file and the part of it that is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Excerpt {
    /// The whole line.
    pub line: String,
    /// How many characters are meant, at least 1.
    pub width: usize,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// What kind, for programs: `unknown-key`, `tie`, `unstable-port`. Never renamed.
    pub code: &'static str,
    /// Where; none when it is about no one place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The key, `assign[0].match.id`; empty when it is about none.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// The line in the file.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "only_line")]
    pub excerpt: Option<Excerpt>,
}

fn only_line<S: Serializer>(excerpt: &Option<Excerpt>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(excerpt.as_ref().map_or("", |excerpt| &excerpt.line))
}

impl Problem {
    /// A problem that is about no one place yet.
    pub fn new(severity: Severity, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            severity,
            code,
            origin: None,
            key: String::new(),
            message: message.into(),
            help: None,
            excerpt: None,
        }
    }

    /// The same, with its place.
    #[must_use]
    pub fn at(mut self, origin: &Origin) -> Self {
        self.origin = Some(origin.clone());
        self
    }

    /// The same, with its key.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = key.into();
        self
    }

    /// The same, with what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// One line, for logs: `policy.toml:7:3: error: assign[0].vmm: unknown key (did you mean "vm"?)`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        write!(f, "{}: ", self.severity)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        match &self.help {
            Some(help) => write!(f, " ({help})"),
            None => Ok(()),
        }
    }
}

/// Adds to each problem the line that it is about, if it has a place but no excerpt yet.
pub fn quote(problems: &mut [Problem], sources: &[Source]) {
    for problem in problems {
        let (Some(origin), None) = (&problem.origin, &problem.excerpt) else { continue };
        let Some(source) = sources.iter().find(|source| source.path == origin.file) else { continue };
        let row = usize::try_from(origin.line).unwrap_or(usize::MAX).saturating_sub(1);
        let line = source.text.lines().nth(row);
        problem.excerpt = line.map(|line| Excerpt { line: line.to_owned(), width: 1 });
    }
}

/// Turns byte offsets of one text into lines and columns.
#[derive(Debug)]
pub(super) struct LineIndex<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> LineIndex<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Self { text, starts }
    }

    /// Line and column of a byte offset, both from 1, and the excerpt for `len` bytes from there.
    pub(super) fn locate(&self, offset: usize, len: usize) -> (u32, u32, Excerpt) {
        let offset = offset.min(self.text.len());
        let row = self.starts.partition_point(|&start| start <= offset).saturating_sub(1);
        let start = self.starts.get(row).copied().unwrap_or(0);
        let line = self.text.get(start..).unwrap_or("").lines().next().unwrap_or("");
        let before = self.text.get(start..offset).unwrap_or("").chars().count();
        let meant = self.text.get(offset..offset.saturating_add(len)).unwrap_or("");
        let width = meant.lines().next().unwrap_or("").chars().count().max(1);
        let count = |number: usize| u32::try_from(number.saturating_add(1)).unwrap_or(u32::MAX);
        (count(row), count(before), Excerpt { line: line.to_owned(), width })
    }
}
