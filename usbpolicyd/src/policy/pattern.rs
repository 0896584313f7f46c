//! Patterns that a rule compares a device with: globs, ids, interface classes. Each can also say whether it and
//! another one can be true of the same device, and whether it is true whenever another one is; `check` needs both.

use std::fmt;
use std::str::FromStr;

use common::ids::VendorProduct;

use crate::facts::{ClassTriple, parse_hex_byte};

/// The longest glob we take; a string descriptor has at most 126 UTF-16 units (USB 2.0 §9.6.7).
pub const GLOB_MAX: usize = 256;

/// A text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    /// Not an id pattern.
    #[error(
        "{0:?} is not an id: four hex digits, ':', four hex digits or '*', like \"046d:c52b\" or \"046d:*\""
    )]
    Id(String),
    /// Not a class pattern.
    #[error(
        "{0:?} is not an interface class: a name like \"hid.keyboard\" or hex \"03\", \"03:01\", \"03:01:01\""
    )]
    Class(String),
    /// Longer than [`GLOB_MAX`], or empty.
    #[error("a glob has 1 to {GLOB_MAX} characters")]
    Glob,
}

/// One step of a glob.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Step {
    Char(char),
    AnyChar,
    AnyRun,
}

/// Text with `*` for any run of characters, `?` for any one and `\` before a character that stands for itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Glob {
    text: String,
    steps: Vec<Step>,
    fold_case: bool,
}

impl Glob {
    /// Takes the text of a policy. With `fold_case`, case makes no difference.
    pub fn new(text: &str, fold_case: bool) -> Result<Self, PatternError> {
        if text.is_empty() || text.chars().count() > GLOB_MAX {
            return Err(PatternError::Glob);
        }
        let mut steps = Vec::new();
        let mut chars = text.chars();
        while let Some(one) = chars.next() {
            let step = match one {
                '*' => Step::AnyRun,
                '?' => Step::AnyChar,
                '\\' => Step::Char(chars.next().unwrap_or('\\')),
                other => Step::Char(other),
            };
            if !(step == Step::AnyRun && steps.last() == Some(&Step::AnyRun)) {
                steps.push(step);
            }
        }
        if fold_case {
            for step in &mut steps {
                if let Step::Char(one) = step {
                    *one = folded(*one);
                }
            }
        }
        Ok(Self { text: text.to_owned(), steps, fold_case })
    }

    /// A glob that means exactly this text.
    pub fn literal(text: &str, fold_case: bool) -> Result<Self, PatternError> {
        let mut escaped = String::with_capacity(text.len());
        for one in text.chars() {
            if matches!(one, '*' | '?' | '\\') {
                escaped.push('\\');
            }
            escaped.push(one);
        }
        Self::new(&escaped, fold_case)
    }

    /// The text as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the whole of `text` fits. Time is bounded by length of glob times length of text.
    pub fn matches(&self, text: &str) -> bool {
        let mut step = 0;
        let mut rest = text.chars();
        // Where the last run stands and what of the text it has not taken.
        let mut run: Option<(usize, std::str::Chars<'_>)> = None;
        loop {
            match self.steps.get(step) {
                Some(Step::AnyRun) => {
                    step += 1;
                    if step == self.steps.len() {
                        return true;
                    }
                    run = Some((step, rest.clone()));
                    continue;
                }
                Some(wanted) => match rest.next() {
                    Some(one) if self.fits(*wanted, one) => {
                        step += 1;
                        continue;
                    }
                    Some(_) => {}
                    None => return false,
                },
                None if rest.as_str().is_empty() => return true,
                None => {}
            }
            // No fit: the last run takes one character more. What came before it need not be tried again.
            let Some((after, from)) = &mut run else { return false };
            if from.next().is_none() {
                return false;
            }
            step = *after;
            rest = from.clone();
        }
    }

    fn fits(&self, step: Step, one: char) -> bool {
        match step {
            Step::Char(wanted) => wanted == if self.fold_case { folded(one) } else { one },
            Step::AnyChar | Step::AnyRun => true,
        }
    }

    /// What a text must have to fit.
    pub fn letters(&self) -> Letters {
        let letters = self.steps.iter().filter_map(|step| match step {
            // Folded already where case makes no difference.
            Step::Char(one) => Some(if self.fold_case { *one } else { folded(*one) }),
            Step::AnyChar | Step::AnyRun => None,
        });
        Letters::collect(letters)
    }

    /// Whether some text fits both. Exact for globs of the same case rule, and both keys that use globs have one rule.
    pub fn overlaps(&self, other: &Self) -> bool {
        let (rows, columns) = (self.steps.len(), other.steps.len());
        let mut reachable = vec![vec![false; columns + 1]; rows + 1];
        reachable[0][0] = true;
        for row in 0..=rows {
            for column in 0..=columns {
                if !reachable[row][column] {
                    continue;
                }
                let (left, right) = (self.steps.get(row), other.steps.get(column));
                if left == Some(&Step::AnyRun) {
                    reachable[row + 1][column] = true;
                }
                if right == Some(&Step::AnyRun) {
                    reachable[row][column + 1] = true;
                }
                let (Some(left), Some(right)) = (left, right) else { continue };
                let one_char_fits_both = match (left, right) {
                    (Step::Char(a), Step::Char(b)) => a == b,
                    _ => true,
                };
                if one_char_fits_both {
                    let down = usize::from(*left != Step::AnyRun);
                    let across = usize::from(*right != Step::AnyRun);
                    reachable[row + down][column + across] = true;
                }
            }
        }
        reachable[rows][columns]
    }

    /// Whether each text that fits `other` fits this one too. May say no when it is so; never yes when it is not.
    pub fn covers(&self, other: &Self) -> bool {
        if self.steps == [Step::AnyRun] || self.steps == other.steps {
            return true;
        }
        let literal: Option<String> = other
            .steps
            .iter()
            .map(|step| if let Step::Char(one) = step { Some(*one) } else { None })
            .collect();
        literal.is_some_and(|text| self.matches(&text))
    }
}

/// The letters of a text as a set, without case and with strange ones mixed up: a glob cannot fit a text that lacks one
/// of the glob's. Comparing two sets costs next to nothing, comparing glob and text does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Letters(u128);

impl Letters {
    /// Those of a text.
    pub fn of(text: &str) -> Self {
        Self::collect(text.chars().map(folded))
    }

    fn collect(letters: impl Iterator<Item = char>) -> Self {
        Self(letters.fold(0, |set, one| set | 1 << (u32::from(one) % u128::BITS)))
    }

    /// Whether all of `other` are there.
    pub const fn contains(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    /// Those that are in both.
    #[must_use]
    pub const fn common(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

/// One lower-case character for one character, so that lengths stay equal.
fn folded(one: char) -> char {
    if one.is_ascii() {
        return one.to_ascii_lowercase();
    }
    let mut lower = one.to_lowercase();
    match (lower.next(), lower.next()) {
        (Some(only), None) => only,
        _ => one,
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// `046d:c52b`, `046d:*` or `*:*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IdPattern {
    /// Vendor; none stands for any.
    pub vendor: Option<u16>,
    /// Product; none stands for any. Never set without a vendor.
    pub product: Option<u16>,
}

impl IdPattern {
    /// Exactly this id.
    pub const fn exact(id: VendorProduct) -> Self {
        Self { vendor: Some(id.vendor), product: Some(id.product) }
    }

    /// Whether the id fits.
    pub fn matches(self, id: VendorProduct) -> bool {
        self.vendor.is_none_or(|vendor| vendor == id.vendor)
            && self.product.is_none_or(|product| product == id.product)
    }

    /// Whether some id fits both.
    pub fn overlaps(self, other: Self) -> bool {
        both(self.vendor, other.vendor) && both(self.product, other.product)
    }

    /// Whether each id that fits `other` fits this one.
    pub fn covers(self, other: Self) -> bool {
        above(self.vendor, other.vendor) && above(self.product, other.product)
    }
}

fn both<T: PartialEq>(left: Option<T>, right: Option<T>) -> bool {
    left.is_none() || right.is_none() || left == right
}

fn above<T: PartialEq>(wide: Option<T>, narrow: Option<T>) -> bool {
    wide.is_none() || wide == narrow
}

impl fmt::Display for IdPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.vendor {
            Some(vendor) => write!(f, "{vendor:04x}:")?,
            None => f.write_str("*:")?,
        }
        match self.product {
            Some(product) => write!(f, "{product:04x}"),
            None => f.write_str("*"),
        }
    }
}

impl FromStr for IdPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let bad = || PatternError::Id(text.to_owned());
        if text == "*:*" {
            return Ok(Self { vendor: None, product: None });
        }
        if let Some(vendor) = text.strip_suffix(":*") {
            let id: VendorProduct = format!("{vendor}:0000").parse().map_err(|_| bad())?;
            return Ok(Self { vendor: Some(id.vendor), product: None });
        }
        Ok(Self::exact(text.parse().map_err(|_| bad())?))
    }
}

/// A class, or a class and subclass, or all three.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassPattern {
    /// Class; none stands for any, which no policy can write but `check` needs.
    pub class: Option<u8>,
    /// Subclass; none stands for any.
    pub subclass: Option<u8>,
    /// Protocol; none stands for any.
    pub protocol: Option<u8>,
}

impl ClassPattern {
    /// Fits every interface.
    pub const ANY: Self = Self { class: None, subclass: None, protocol: None };

    /// Whether the interface fits.
    pub fn matches(self, triple: ClassTriple) -> bool {
        self.class.is_none_or(|one| one == triple.class)
            && self.subclass.is_none_or(|one| one == triple.subclass)
            && self.protocol.is_none_or(|one| one == triple.protocol)
    }

    /// What fits both, if anything does.
    pub fn meet(self, other: Self) -> Option<Self> {
        let fits = both(self.class, other.class)
            && both(self.subclass, other.subclass)
            && both(self.protocol, other.protocol);
        fits.then(|| Self {
            class: self.class.or(other.class),
            subclass: self.subclass.or(other.subclass),
            protocol: self.protocol.or(other.protocol),
        })
    }

    /// Whether each interface that fits `other` fits this one.
    pub fn covers(self, other: Self) -> bool {
        above(self.class, other.class)
            && above(self.subclass, other.subclass)
            && above(self.protocol, other.protocol)
    }
}

const fn class(class: u8) -> ClassPattern {
    ClassPattern { class: Some(class), subclass: None, protocol: None }
}

const fn sub(one: u8, subclass: u8) -> ClassPattern {
    ClassPattern { class: Some(one), subclass: Some(subclass), protocol: None }
}

const fn full(one: u8, subclass: u8, protocol: u8) -> ClassPattern {
    ClassPattern { class: Some(one), subclass: Some(subclass), protocol: Some(protocol) }
}

/// Names for classes (usb.org, "Defined Class Codes"). `cdc` has both the control and the data interface.
pub const CLASS_NAMES: &[(&str, &[ClassPattern])] = &[
    ("audio", &[class(0x01)]),
    ("audio.midi", &[sub(0x01, 0x03)]),
    ("billboard", &[class(0x11)]),
    ("cdc", &[class(0x02), class(0x0a)]),
    ("cdc.acm", &[sub(0x02, 0x02)]),
    ("cdc.data", &[class(0x0a)]),
    ("cdc.ecm", &[sub(0x02, 0x06)]),
    ("cdc.mbim", &[sub(0x02, 0x0e)]),
    ("cdc.ncm", &[sub(0x02, 0x0d)]),
    ("dfu", &[sub(0xfe, 0x01)]),
    ("diagnostic", &[class(0xdc)]),
    ("hid", &[class(0x03)]),
    ("hid.boot", &[sub(0x03, 0x01)]),
    ("hid.keyboard", &[full(0x03, 0x01, 0x01)]),
    ("hid.mouse", &[full(0x03, 0x01, 0x02)]),
    ("hub", &[class(0x09)]),
    ("image", &[class(0x06)]),
    ("misc", &[class(0xef)]),
    ("personal-healthcare", &[class(0x0f)]),
    ("printer", &[class(0x07)]),
    ("smartcard", &[class(0x0b)]),
    ("storage", &[class(0x08)]),
    ("storage.bulk-only", &[full(0x08, 0x06, 0x50)]),
    ("storage.uas", &[full(0x08, 0x06, 0x62)]),
    ("vendor", &[class(0xff)]),
    ("video", &[class(0x0e)]),
    ("wireless", &[class(0xe0)]),
    ("wireless.bluetooth", &[full(0xe0, 0x01, 0x01)]),
    ("wireless.rndis", &[full(0xe0, 0x01, 0x03)]),
];

/// What one entry of a class list stands for: a name or `cc[:ss[:pp]]`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassSet {
    text: String,
    patterns: Vec<ClassPattern>,
}

impl ClassSet {
    /// The patterns; an interface fits the set when it fits one of them.
    pub fn patterns(&self) -> &[ClassPattern] {
        &self.patterns
    }

    /// Whether the interface fits.
    pub fn matches(&self, triple: ClassTriple) -> bool {
        self.patterns.iter().any(|one| one.matches(triple))
    }
}

impl fmt::Display for ClassSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for ClassSet {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if let Some((_, patterns)) = CLASS_NAMES.iter().find(|(name, _)| *name == text) {
            return Ok(Self { text: text.to_owned(), patterns: patterns.to_vec() });
        }
        let mut bytes = [None; 3];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let Some(part) = parts.next() else { break };
            *byte = Some(parse_hex_byte(part).ok_or_else(|| PatternError::Class(text.to_owned()))?);
        }
        let [class, subclass, protocol] = bytes;
        if parts.next().is_some() || class.is_none() {
            return Err(PatternError::Class(text.to_owned()));
        }
        let text = text.to_ascii_lowercase();
        Ok(Self { text, patterns: vec![ClassPattern { class, subclass, protocol }] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(text: &str) -> Glob {
        Glob::new(text, false).unwrap()
    }

    #[test]
    fn glob_takes_runs_single_characters_and_escapes() {
        assert!(glob("4C53*").matches("4C530001"));
        assert!(glob("*01").matches("4C530001"));
        assert!(glob("a?c").matches("abc"));
        assert!(!glob("a?c").matches("ac"));
        assert!(!glob("abc").matches("abcd"));
        assert!(glob(r"a\*c").matches("a*c"));
        assert!(!glob(r"a\*c").matches("abc"));
        assert!(Glob::new("*ultra*", true).unwrap().matches("SanDisk ULTRA fit"));
    }

    #[test]
    fn many_stars_do_not_take_exponential_time() {
        assert!(!glob("*a*a*a*a*a*a*a*a*a*a*a*a*b").matches(&"a".repeat(200)));
    }

    #[test]
    fn runs_give_back_what_they_took_too_much() {
        assert!(glob("*ab*b").matches("aabab"));
        assert!(glob("a*b*c").matches("abcbc"));
        assert!(glob("*?b").matches("bbb"));
        assert!(!glob("a*b*c").matches("abcb"));
        assert!(!glob("*ab").matches("aba"));
        assert!(glob("**").matches(""));
        assert!(!glob("?").matches(""));
    }

    #[test]
    fn text_that_fits_has_all_letters_of_the_glob() {
        for (text, fold_case, fits) in [
            ("*Stick*17*", true, "some STICK, number 0170"),
            ("*Stick*17*", false, "a Stick 17"),
            ("\u{c4}?\u{1f600}*", true, "\u{e4}b\u{1f600}"),
            (r"a\*b", false, "a*b"),
            ("*", true, ""),
        ] {
            let glob = Glob::new(text, fold_case).unwrap();
            assert!(glob.matches(fits), "{text}");
            assert!(Letters::of(fits).contains(glob.letters()), "{text}");
        }
        assert!(!Letters::of("a Stick 18").contains(glob("*Stick*17*").letters()));
    }

    #[test]
    fn globs_overlap_exactly_when_a_text_fits_both() {
        for (left, right, overlap) in [
            ("a*", "*b", true),
            ("a*", "b*", false),
            ("a?", "ab*", true),
            ("*", "", true),
            ("abc", "a?c", true),
            ("a*c", "ab", false),
        ] {
            let right = if right.is_empty() { "x" } else { right };
            assert_eq!(glob(left).overlaps(&glob(right)), overlap, "{left} {right}");
            assert_eq!(glob(right).overlaps(&glob(left)), overlap, "{right} {left}");
        }
    }

    #[test]
    fn literal_glob_means_its_text_only() {
        let odd = Glob::literal(r"a*?\", false).unwrap();
        assert!(odd.matches(r"a*?\"));
        assert!(!odd.matches(r"abc\"));
    }

    #[test]
    fn id_patterns_of_other_forms_are_refused() {
        for text in ["", "*", "*:0001", "046d", "046d:", ":*", "46d:*", "046d:c52*"] {
            assert!(text.parse::<IdPattern>().is_err(), "{text}");
        }
        assert_eq!("046D:*".parse::<IdPattern>().unwrap().to_string(), "046d:*");
    }

    #[test]
    fn class_names_and_numbers_mean_the_same() {
        let keyboard: ClassTriple = "03:01:01".parse().unwrap();
        for text in ["hid", "hid.boot", "hid.keyboard", "03", "03:01", "03:01:01"] {
            assert!(text.parse::<ClassSet>().unwrap().matches(keyboard), "{text}");
        }
        for text in ["", "3", "03:", "03:01:01:00", "hid.", "keyboard"] {
            assert!(text.parse::<ClassSet>().is_err(), "{text}");
        }
    }
}
