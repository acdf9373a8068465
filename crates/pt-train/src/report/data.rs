//! What a report says of a data set.

use super::grouped;
use crate::data::PreflightSummary;

/// A data set as the report tables it: a line a source, then notes and warnings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DataTable {
    /// What the set is for.
    pub name: String,
    /// Titles of the columns after the source's name.
    pub head: Vec<&'static str>,
    /// Each source with its cells.
    pub sources: Vec<(String, Vec<String>)>,
    /// Facts in words.
    pub notes: Vec<String>,
    /// Things worth a look.
    pub warnings: Vec<String>,
}

impl DataTable {
    /// Of rows for supervised training.
    pub fn of_rows(name: &str, summary: &PreflightSummary) -> Self {
        let head = vec![
            "rows",
            "trained rows",
            "over-long",
            "cut",
            "nothing to train",
            "duplicates",
            "tokens",
            "trained tokens",
            "median length",
            "longest",
        ];
        let sources = summary.sources.iter().map(|source| {
            let counts = [
                source.rows,
                source.kept,
                source.over_long,
                source.truncated,
                source.dropped_empty,
                source.duplicates,
                source.tokens,
                source.labels,
                source.length_median,
                source.length_max,
            ];
            (source.name.clone(), counts.map(grouped).into())
        });
        let sources = sources.collect();
        Self { name: name.into(), head, sources, notes: vec![], warnings: summary.warnings.clone() }
    }
}
