//! What a report says of a data set.

use super::grouped;
use crate::data::{PreferenceSummary, PreflightSummary};

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

    /// Of preferences.
    pub fn of_preferences(name: &str, summary: &PreferenceSummary) -> Self {
        let head = vec![
            "rows",
            "trained rows",
            "over-long",
            "cut",
            "void",
            "duplicates",
            "pairs",
            "tokens",
            "mean prompt",
            "mean chosen",
            "mean rejected",
        ];
        let sources = summary.sources.iter().map(|source| {
            let counts = &source.counts;
            let counted = [
                counts.rows,
                counts.kept,
                counts.over_long,
                counts.truncated,
                counts.dropped_empty,
                counts.duplicates,
                source.pairs,
                counts.tokens,
            ];
            let lengths = [&source.prompt, &source.chosen, &source.rejected].map(|of| format!("{:.0}", of.mean));
            (counts.name.clone(), counted.map(grouped).into_iter().chain(lengths).collect())
        });
        let sources = sources.collect();
        let lines = |source: &crate::data::PreferenceSource| {
            source.lines().into_iter().map(|line| format!("{}: {line}", source.counts.name)).collect::<Vec<_>>()
        };
        let notes = summary.sources.iter().flat_map(lines).collect();
        Self { name: name.into(), head, sources, notes, warnings: summary.warnings.clone() }
    }
}
