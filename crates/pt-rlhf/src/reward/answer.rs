//! Whether a response gives the answer that the prompt's row holds: as a text, or as a number.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::number::{Quantity, numbers};
use super::{Fault, Reward, Sample, check, compile, excerpt};
use crate::error::Result;

/// What is made equal before two texts are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// Only the space at both ends goes.
    #[default]
    None,
    /// SQuAD's: lower case, no ASCII punctuation, no articles (a, an, the), single spaces. Rajpurkar et al. 2016,
    /// <https://arxiv.org/abs/1606.05250>, the evaluation script of version 1.1.
    Squad,
}

impl Normalization {
    /// The text as it is compared.
    pub fn apply(self, text: &str) -> String {
        match self {
            Self::None => text.trim().to_owned(),
            Self::Squad => squad(text),
        }
    }
}

fn squad(text: &str) -> String {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    // An article is a whole word; what bounds a word need not be space (a curly quote, a dash).
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut kept = String::with_capacity(plain.len());
    let mut rest = plain.as_str();
    while let Some(first) = rest.chars().next() {
        let end = rest.find(|c: char| is_word(c) != is_word(first)).unwrap_or(rest.len());
        let (run, after) = rest.split_at(end);
        kept.push_str(if matches!(run, "a" | "an" | "the") { " " } else { run });
        rest = after;
    }
    kept.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A reward of 1 where the response is the answer in the prompt's row, else 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExactConfig {
    /// Name in metrics; null for `exact`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// Field of the prompt's row with the answer: a text or a number, or a list of them, any of which will do.
    pub answer_field: String,
    /// Regular expression whose last match in the response is taken for its answer (where it has groups, the first that
    /// took part); null for the whole response. Applied to the row's answer as well, where it matches there.
    pub extract: Option<String>,
    /// What is made equal before the texts are compared: `none`, `squad`.
    pub normalization: Normalization,
    /// Whether it is enough that the answer stands somewhere in the response, as whole words.
    pub contains: bool,
}

impl Default for ExactConfig {
    fn default() -> Self {
        Self {
            name: None,
            weight: 1.0,
            answer_field: "answer".into(),
            extract: None,
            normalization: Normalization::None,
            contains: false,
        }
    }
}

impl ExactConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        answer_faults(&self.answer_field, self.extract.as_deref())
    }
}

pub(super) fn answer_faults(answer_field: &str, extract: Option<&str>) -> Vec<String> {
    let mut faults = Vec::new();
    if answer_field.is_empty() {
        faults.push("answer_field is empty, expected the name of a field".into());
    }
    faults.extend(extract.and_then(|pattern| compile("extract", pattern).err()));
    faults
}

fn extractor(extract: Option<&str>) -> Option<Regex> {
    extract.and_then(|pattern| compile("extract", pattern).ok())
}

/// Whether the response is the answer; see [`ExactConfig`].
pub struct ExactMatch {
    name: String,
    config: ExactConfig,
    extract: Option<Regex>,
}

impl ExactMatch {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &ExactConfig) -> Result<Self> {
        check(name, config.faults())?;
        Ok(Self { name: name.to_owned(), config: config.clone(), extract: extractor(config.extract.as_deref()) })
    }

    /// The answers of a row that will do, normalized.
    fn answers(&self, fields: &Map<String, Value>) -> std::result::Result<Vec<String>, Fault> {
        let ExactConfig { answer_field, normalization, .. } = &self.config;
        let answer = |value: &Value| {
            let text = match value {
                Value::String(text) => text.clone(),
                Value::Number(number) => number.to_string(),
                other => return Err(wrong_answer(answer_field, other, "a text, or a list of texts")),
            };
            let part = self.extract.as_ref().and_then(|extract| last_match(extract, &text)).unwrap_or(&text);
            let normal = normalization.apply(part);
            if normal.is_empty() {
                // Equal to every empty response, and contained in every response.
                return Err(Fault::new(
                    format!("`{answer_field}` of its row is {}, of which normalization leaves nothing", excerpt(&text)),
                    match normalization {
                        Normalization::None => "mend that row",
                        Normalization::Squad => "mend that row, or set normalization to `none`",
                    },
                ));
            }
            Ok(normal)
        };
        row_answers(fields, answer_field)?.iter().map(answer).collect()
    }
}

impl Reward for ExactMatch {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        let score = |(index, sample): (usize, &Sample<'_>)| {
            let answers = self.answers(sample.fields).map_err(|fault| fault.at_sample(&self.name, index, samples))?;
            let part = match &self.extract {
                Some(extract) => last_match(extract, sample.response),
                None => Some(sample.response),
            };
            let is_right = part.is_some_and(|part| {
                let given = self.config.normalization.apply(part);
                answers.iter().any(|answer| match self.config.contains {
                    true => contains_words(&given, answer),
                    false => given == *answer,
                })
            });
            Ok(f64::from(is_right))
        };
        samples.iter().enumerate().map(score).collect()
    }

    fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
        self.answers(fields).map(drop).map_err(|fault| fault.into_error(&self.name))
    }
}

/// What counts as a number with a percent sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Percent {
    /// The sign is a unit like any other: 50% is 50.
    #[default]
    Ignored,
    /// 50% is 0.5.
    Hundredths,
}

/// A reward of 1 where the number of the response is that of the prompt's row, else 0.
///
/// Separators of thousands, signs, decimals, fractions, currencies and percent signs are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NumberConfig {
    /// Name in metrics; null for `number`.
    pub name: Option<String>,
    /// Factor of the score in the sum of rewards.
    pub weight: f64,
    /// Field of the prompt's row with the answer: a number or a text that ends in one, or a list of them, any of which
    /// will do.
    pub answer_field: String,
    /// Regular expression that the number follows, such as `####`; or one with a group, in which the number stands. Its
    /// last match counts, and a response without one scores 0. Null for the last number of the response. Applied to the
    /// row's answer as well, where it matches there.
    pub extract: Option<String>,
    /// What a percent sign does: `ignored` (50% is 50), `hundredths` (50% is 0.5).
    pub percent: Percent,
    /// How far the number may be from the answer.
    pub tolerance: f64,
    /// How far it may be, in addition, as a share of the answer.
    pub relative_tolerance: f64,
}

impl Default for NumberConfig {
    fn default() -> Self {
        Self {
            name: None,
            weight: 1.0,
            answer_field: "answer".into(),
            extract: None,
            percent: Percent::Ignored,
            tolerance: 1e-6,
            relative_tolerance: 0.0,
        }
    }
}

impl NumberConfig {
    /// Every fault, each naming its field, what it is and what was expected.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = answer_faults(&self.answer_field, self.extract.as_deref());
        for (field, value) in [("tolerance", self.tolerance), ("relative_tolerance", self.relative_tolerance)] {
            if !(value >= 0.0 && value.is_finite()) {
                faults.push(format!("{field} is {value}, expected at least 0"));
            }
        }
        faults
    }
}

/// Whether the number of the response is the answer; see [`NumberConfig`].
pub struct NumberMatch {
    name: String,
    config: NumberConfig,
    extract: Option<Regex>,
}

impl NumberMatch {
    /// Under a name for metrics.
    ///
    /// # Errors
    /// [`RlhfError::Config`](crate::RlhfError::Config) with every fault of the configuration.
    pub fn new(name: &str, config: &NumberConfig) -> Result<Self> {
        check(name, config.faults())?;
        Ok(Self { name: name.to_owned(), config: config.clone(), extract: extractor(config.extract.as_deref()) })
    }

    /// The numbers of a row that will do.
    fn answers(&self, fields: &Map<String, Value>) -> std::result::Result<Vec<f64>, Fault> {
        let field = &self.config.answer_field;
        let answer = |value: &Value| {
            let number = match value {
                Value::Number(number) => number.as_f64().filter(|number| number.is_finite()),
                Value::String(text) => {
                    // An answer without the pattern is the bare number as a rule.
                    let is_bare = self.extract.as_ref().is_some_and(|extract| !extract.is_match(text));
                    if is_bare { numbers(text).pop().map(|number| self.value(number)) } else { self.number_of(text) }
                }
                _ => None,
            };
            number.ok_or_else(|| wrong_answer(field, value, "a number, or a text that ends in one, or a list of them"))
        };
        row_answers(fields, field)?.iter().map(answer).collect()
    }

    /// The number that a text gives as its answer.
    fn number_of(&self, text: &str) -> Option<f64> {
        let number = match &self.extract {
            None => numbers(text).pop(),
            Some(extract) if extract.captures_len() > 1 => numbers(last_match(extract, text)?).pop(),
            Some(extract) => {
                let end = extract.find_iter(text).last()?.end();
                numbers(text.get(end..)?).first().copied()
            }
        };
        number.map(|number| self.value(number))
    }

    fn value(&self, number: Quantity) -> f64 {
        match self.config.percent {
            Percent::Hundredths if number.is_percent => number.value / 100.0,
            _ => number.value,
        }
    }
}

impl Reward for NumberMatch {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample<'_>]) -> Result<Vec<f64>> {
        let NumberConfig { tolerance, relative_tolerance, .. } = self.config;
        let score = |(index, sample): (usize, &Sample<'_>)| {
            let answers = self.answers(sample.fields).map_err(|fault| fault.at_sample(&self.name, index, samples))?;
            let is_right = self.number_of(sample.response).is_some_and(|given| {
                let is_near = |answer: &f64| (given - answer).abs() <= tolerance + relative_tolerance * answer.abs();
                answers.iter().any(is_near)
            });
            Ok(f64::from(is_right))
        };
        samples.iter().enumerate().map(score).collect()
    }

    fn check_fields(&self, fields: &Map<String, Value>) -> Result<()> {
        self.answers(fields).map(drop).map_err(|fault| fault.into_error(&self.name))
    }
}

/// The values of a row's answer: those of a list, or the one.
pub(super) fn row_answers<'a>(fields: &'a Map<String, Value>, name: &str) -> std::result::Result<&'a [Value], Fault> {
    match fields.get(name) {
        None | Some(Value::Null) => {
            let names = fields.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
            let found = if names.is_empty() { "no fields".into() } else { names };
            Err(Fault::new(
                format!("its row has no `{name}`, it has {found}"),
                "name the field that holds the answer with answer_field",
            ))
        }
        Some(Value::Array(list)) if list.is_empty() => {
            Err(Fault::new(format!("`{name}` of its row is an empty list, expected an answer"), "mend that row"))
        }
        Some(Value::Array(list)) => Ok(list),
        Some(value) => Ok(std::slice::from_ref(value)),
    }
}

pub(super) fn wrong_answer(field: &str, value: &Value, expected: &str) -> Fault {
    let found = match value {
        Value::String(text) => excerpt(text),
        other => other.to_string().chars().take(60).collect(),
    };
    Fault::new(
        format!("`{field}` of its row is {found}, expected {expected}"),
        "mend that row, or name another field with answer_field",
    )
}

/// The last match in a text: the first group that took part, or else the whole of it.
fn last_match<'a>(pattern: &Regex, text: &'a str) -> Option<&'a str> {
    let captures = pattern.captures_iter(text).last()?;
    let group = captures.iter().skip(1).flatten().next();
    group.or_else(|| captures.get(0)).map(|part| part.as_str())
}

/// Whether `wanted` stands in `text` and not as a part of a longer word or number.
fn contains_words(text: &str, wanted: &str) -> bool {
    let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    let (first, last) = (is_word(wanted.chars().next()), is_word(wanted.chars().next_back()));
    let mut from = 0;
    while let Some(start) = text.get(from..).and_then(|rest| rest.find(wanted)).map(|offset| from + offset) {
        let (before, after) = (&text[..start], &text[start + wanted.len()..]);
        let joins_before = first && is_word(before.chars().next_back());
        let joins_after = last && is_word(after.chars().next());
        if !joins_before && !joins_after {
            return true;
        }
        // Matches may overlap: go on one character further.
        from = start + text[start..].chars().next().map_or(1, char::len_utf8);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::checked_scores;
    use super::super::testing::*;
    use super::*;

    fn exact(config: ExactConfig) -> ExactMatch {
        ExactMatch::new("exact", &config).expect("good")
    }

    fn number(config: NumberConfig) -> NumberMatch {
        NumberMatch::new("number", &config).expect("good")
    }

    #[test]
    fn the_whole_response_is_compared_but_for_space_at_its_ends() {
        let mut reward = exact(ExactConfig::default());
        assert_eq!(
            scores(&mut reward, r#"{"answer":"Paris"}"#, &["Paris", " Paris\n", "paris", "Paris.", ""]),
            [1.0, 1.0, 0.0, 0.0, 0.0]
        );
        assert_eq!(scores(&mut reward, r#"{"answer":["Paris","Lutetia"]}"#, &["Lutetia", "Rome"]), [1.0, 0.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":7}"#, &["7", "7.0"]), [1.0, 0.0]);
    }

    #[test]
    fn squad_normalization_is_that_of_the_evaluation_script() {
        for (text, normal) in [
            ("The  Eiffel-Tower!", "eiffeltower"),
            ("an apple a day", "apple day"),
            ("“the” theatre", "“ ” theatre"),
            ("U.S.A.", "usa"),
            ("A", ""),
            ("", ""),
            ("ÉCOLE  the", "école"),
        ] {
            assert_eq!(squad(text), normal, "{text:?}");
        }
        let mut reward = exact(ExactConfig { normalization: Normalization::Squad, ..ExactConfig::default() });
        assert_eq!(
            scores(&mut reward, r#"{"answer":"the Beatles"}"#, &["Beatles!", "The  beatles", "Beatle"]),
            [1.0, 1.0, 0.0]
        );
    }

    #[test]
    fn the_last_match_of_the_pattern_is_the_answer() {
        let config = ExactConfig { extract: Some("(?s)<answer>(.*?)</answer>".into()), ..ExactConfig::default() };
        let mut reward = exact(config);
        let responses = [
            "<answer>A</answer> no: <answer>\nB\n</answer>",
            "<answer>B</answer> no: <answer>A</answer>",
            "B",
            "<answer>B",
        ];
        assert_eq!(scores(&mut reward, r#"{"answer":"B"}"#, &responses), [1.0, 0.0, 0.0, 0.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":"so <answer>B</answer>"}"#, &responses), [1.0, 0.0, 0.0, 0.0]);
        let mut reward = exact(ExactConfig { extract: Some("x(\\d)|[A-D]".into()), ..ExactConfig::default() });
        assert_eq!(scores(&mut reward, r#"{"answer":"C"}"#, &["A or C?", "C or x1"]), [1.0, 0.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":"1"}"#, &["A or C?", "C or x1"]), [0.0, 1.0]);
    }

    #[test]
    fn a_contained_answer_is_whole_words() {
        let mut reward = exact(ExactConfig { contains: true, ..ExactConfig::default() });
        let responses = ["it is 12.", "312", "121", "12", "1 2", "(12)", "a12 12"];
        assert_eq!(scores(&mut reward, r#"{"answer":"12"}"#, &responses), [1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":"a a"}"#, &["xa a a", "xa a"]), [1.0, 0.0], "overlapping");
        assert_eq!(scores(&mut reward, r#"{"answer":"+é"}"#, &["x+é", "+éx", "€+é€"]), [1.0, 0.0, 1.0]);
    }

    #[test]
    fn rows_without_an_answer_are_named_at_the_sample_and_before() {
        let mut reward = exact(ExactConfig::default());
        let (good, bad) = (row(r#"{"answer":"a"}"#), row(r#"{"prompt":"q","solution":"a"}"#));
        let error = checked_scores(&mut reward, &[sample("a", &good), sample("b", &bad)]).expect_err("no answer");
        assert_eq!(
            error.to_string(),
            "reward `exact`: sample 2 of 2 (response \"b\"): its row has no `answer`, it has `prompt`, `solution`"
        );
        assert!(error.hint().expect("a hint").contains("answer_field"));
        assert!(reward.check_fields(&good).is_ok());
        let error = reward.check_fields(&bad).expect_err("no answer").to_string();
        assert_eq!(error, "reward `exact`: its row has no `answer`, it has `prompt`, `solution`");
        for wrong in ["null", "[]", "{}", "[{}]", "true", "\" \"", "[\"a\", null]"] {
            assert!(reward.check_fields(&row(&format!("{{\"answer\":{wrong}}}"))).is_err(), "{wrong}");
        }
        let squad = exact(ExactConfig { normalization: Normalization::Squad, ..ExactConfig::default() });
        let error = squad.check_fields(&row(r#"{"answer":"A"}"#)).expect_err("nothing left").to_string();
        assert!(error.contains("is \"A\", of which normalization leaves nothing"), "{error}");
    }

    #[test]
    fn the_last_number_counts() {
        let mut reward = number(NumberConfig::default());
        let responses = ["3 and 4 make 7", "7 it is, not 8", "7.0", "7.1", "", "seven", "$7.", "14/2", "6.9999999"];
        assert_eq!(scores(&mut reward, r#"{"answer":7}"#, &responses), [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":"1,000"}"#, &["1000", "1,000.00", "1"]), [1.0, 1.0, 0.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":[1, "2 1/2"]}"#, &["1", "2.5", "2"]), [1.0, 1.0, 0.0]);
    }

    #[test]
    fn the_number_after_a_marker_counts_and_gsm8k_answers_are_read() {
        let mut reward = number(NumberConfig { extract: Some("####".into()), ..NumberConfig::default() });
        let responses = ["72", "so #### 72", "#### 72 (of 80)", "#### 1 #### 72", "####", "#### none"];
        let gold = r#"{"answer":"48/2 = <<48/2=24>>24 clips in May.\n#### 72"}"#;
        assert_eq!(scores(&mut reward, gold, &responses), [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        assert_eq!(scores(&mut reward, r#"{"answer":"72"}"#, &responses), [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]);
        let boxed = NumberConfig { extract: Some(r"\\boxed\{([^{}]*)\}".into()), ..NumberConfig::default() };
        assert_eq!(scores(&mut number(boxed), r#"{"answer":5}"#, &[r"\boxed{x = 5}", r"5 \boxed{6}"]), [1.0, 0.0]);
    }

    #[test]
    fn percentages_are_numbers_or_hundredths() {
        let mut plain = number(NumberConfig::default());
        assert_eq!(scores(&mut plain, r#"{"answer":50}"#, &["50%", "0.5", "50"]), [1.0, 0.0, 1.0]);
        let mut hundredths = number(NumberConfig { percent: Percent::Hundredths, ..NumberConfig::default() });
        assert_eq!(scores(&mut hundredths, r#"{"answer":"50%"}"#, &["50%", "0.5", "1/2", "50"]), [1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn tolerances_add_up() {
        let config = NumberConfig { tolerance: 0.5, relative_tolerance: 0.01, ..NumberConfig::default() };
        assert_eq!(
            scores(&mut number(config), r#"{"answer":-100}"#, &["-101.5", "-101.6", "-98.5", "100"]),
            [1.0, 0.0, 1.0, 0.0]
        );
        let exactly = NumberConfig { tolerance: 0.0, ..NumberConfig::default() };
        assert_eq!(scores(&mut number(exactly), r#"{"answer":0.1}"#, &["0.1", "1/10", "0.10000001"]), [1.0, 1.0, 0.0]);
    }

    #[test]
    fn a_row_without_a_number_is_refused() {
        let reward = number(NumberConfig::default());
        for wrong in ["\"none\"", "\"1/0\"", "true", "[]", "[1, \"x\"]", "{}", "null"] {
            let error = reward.check_fields(&row(&format!("{{\"answer\":{wrong}}}"))).expect_err(wrong);
            assert!(error.to_string().contains("`answer`") && error.hint().is_some(), "{error}");
        }
        let marked = number(NumberConfig { extract: Some("####".into()), ..NumberConfig::default() });
        assert!(marked.check_fields(&row(r#"{"answer":"5 #### none"}"#)).is_err());
    }

    #[test]
    fn faults_are_listed_at_once() {
        let config = NumberConfig {
            answer_field: String::new(),
            extract: Some("(".into()),
            tolerance: -1.0,
            relative_tolerance: f64::NAN,
            ..NumberConfig::default()
        };
        assert_eq!(config.faults().len(), 4);
        let error = NumberMatch::new("n", &config).err().expect("refused").to_string();
        assert!(error.starts_with("reward `n`: answer_field is empty") && error.contains("relative_tolerance is NaN"));
        assert!(ExactMatch::new("e", &ExactConfig { extract: Some("[".into()), ..ExactConfig::default() }).is_err());
    }
}
