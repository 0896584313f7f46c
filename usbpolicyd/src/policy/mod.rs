//! The policy: what the operator wrote, what it means, and why it decides as it does.
//!
//! Text becomes a [`schema::Policy`] ([`load`]), that becomes a [`compile::CompiledPolicy`], and [`decide::decide`]
//! answers for one device. Nothing in here opens a file, reads a clock or talks to anybody: contents of files, facts of
//! devices and the moment's circumstances are handed in. The order of rules and files never matters to an answer.

mod check;
pub mod compile;
pub mod condition;
pub mod decide;
pub mod explain;
pub mod lint;
pub mod load;
mod overlap;
mod parse;
mod parse_match;
pub mod pattern;
pub mod print;
pub mod problem;
#[cfg(test)]
mod properties;
mod reader;
pub mod schema;
