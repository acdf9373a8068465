//! Which parts of a model a method goes on, resolved as PEFT 0.21 does.

use crate::config::Modules;
use crate::{PeftError, Result};
use regex::Regex;
use std::collections::BTreeSet;

/// Whether names that match nothing are errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// Every name has to match: for settings that a person wrote, where it is a typing error.
    EveryName,
    /// One match is enough, as in PEFT: for files, whose tensors are compared one by one anyway.
    AnyName,
}

/// The settings that choose a method's layers.
#[derive(Debug, Clone, Copy)]
pub struct Targets<'a> {
    /// Layers by name or pattern.
    pub target_modules: &'a Modules,
    /// Layers left out, though `target_modules` names them.
    pub exclude_modules: Option<&'a Modules>,
    /// Only in these decoder layers, counted from 0; empty means all.
    pub layers_to_transform: &'a [i64],
    /// Names of the list that `layers_to_transform` counts in; empty means any.
    pub layers_pattern: &'a [String],
    /// Modules that are trained whole, which get no update.
    pub modules_to_save: &'a [String],
}

/// The positions in `paths` of the layers that get an update. `paths` are the linear layers in model order, the
/// output layer among them at `output_layer`.
///
/// # Errors
/// [`PeftError::NoMatch`] with the nearest names; [`PeftError::Pattern`].
pub fn target_layers(
    config: &Targets<'_>,
    paths: &[&str],
    output_layer: Option<usize>,
    strictness: Strictness,
) -> Result<Vec<usize>> {
    let targets = Matcher::new("target_modules", config.target_modules)?;
    let excluded = config.exclude_modules.map(|m| Matcher::new("exclude_modules", m)).transpose()?;
    if let Matcher::Names(names) = &targets {
        let unmatched: Vec<&String> =
            names.iter().filter(|name| !paths.iter().any(|path| is_suffix(path, name))).collect();
        if (strictness == Strictness::EveryName && !unmatched.is_empty())
            || (!names.is_empty() && unmatched.len() == names.len())
        {
            return Err(no_match("target_modules", unmatched.into_iter().cloned().collect(), paths));
        }
    }
    let layer_pattern = LayerPattern::new(config.layers_pattern)?;
    let is_in_layers = |path: &str| {
        config.layers_to_transform.is_empty()
            || layer_pattern.layer_of(path).is_some_and(|layer| config.layers_to_transform.contains(&layer))
    };
    let is_target = |position: usize, path: &str| {
        if excluded.as_ref().is_some_and(|m| m.is_match(path))
            // A module that is trained whole gets no update, as in PEFT.
            || config.modules_to_save.iter().any(|name| is_part(path, name))
        {
            return false;
        }
        match &targets {
            Matcher::AllLinear => Some(position) != output_layer && is_in_layers(path),
            Matcher::Pattern(pattern) => pattern.is_match(path),
            Matcher::Names(names) if names.iter().any(|name| name == path) => true,
            Matcher::Names(names) => names.iter().any(|name| is_suffix(path, name)) && is_in_layers(path),
        }
    };
    let found: Vec<usize> =
        paths.iter().enumerate().filter(|(position, path)| is_target(*position, path)).map(|(i, _)| i).collect();
    let may_be_empty = matches!(&targets, Matcher::Names(names) if names.is_empty());
    if found.is_empty() && !may_be_empty {
        let names = match config.target_modules {
            Modules::Pattern(pattern) if !config.target_modules.is_all_linear() => vec![pattern.clone()],
            _ => vec![],
        };
        return Err(no_match("target_modules", names, paths));
    }
    Ok(found)
}

/// The parameters, out of `parameters`, that belong to `modules_to_save`: those with a module on their path whose
/// path ends in one of the names. As in PEFT the end need not begin at a dot: `norm` takes `input_layernorm` too.
///
/// # Errors
/// [`PeftError::NoMatch`] with the nearest names.
pub fn saved_parameters(names: &[String], parameters: &[&str]) -> Result<Vec<usize>> {
    let modules_of = |parameter: &str| -> Vec<String> {
        parameter.match_indices('.').map(|(dot, _)| parameter[..dot].to_string()).collect()
    };
    let mut unmatched: BTreeSet<&String> = names.iter().collect();
    let mut found = Vec::new();
    for (position, parameter) in parameters.iter().enumerate() {
        let modules = modules_of(parameter);
        let matches: Vec<&String> =
            names.iter().filter(|name| modules.iter().any(|module| module.ends_with(name.as_str()))).collect();
        for name in &matches {
            unmatched.remove(name);
        }
        if !matches.is_empty() {
            found.push(position);
        }
    }
    if unmatched.is_empty() {
        return Ok(found);
    }
    let modules: Vec<String> = parameters.iter().filter_map(|p| modules_of(p).pop()).collect();
    let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
    Err(no_match("modules_to_save", unmatched.into_iter().cloned().collect(), &modules))
}

/// The value of the first pattern whose end-of-path expression matches, as in PEFT's `rank_pattern`.
///
/// # Errors
/// [`PeftError::Pattern`].
pub fn pattern_value<'a, T>(
    field: &'static str,
    patterns: &'a std::collections::BTreeMap<String, T>,
    path: &str,
) -> Result<Option<&'a T>> {
    for (pattern, value) in patterns {
        if compile(field, pattern, |pattern| format!(r"\A(?:.*\.)?(?:{pattern})\z"))?.is_match(path) {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Whether a list holds an end of the path, wherever that begins, or a pattern matches the whole of it: how PEFT finds
/// IA3's feed-forward layers.
///
/// # Errors
/// [`PeftError::Pattern`].
pub(crate) fn is_end_of(path: &str, field: &'static str, modules: &Modules) -> Result<bool> {
    Ok(match Matcher::new(field, modules)? {
        Matcher::Names(names) => names.iter().any(|name| path.ends_with(name.as_str())),
        matcher => matcher.is_match(path),
    })
}

enum Matcher<'a> {
    AllLinear,
    Pattern(Regex),
    Names(&'a [String]),
}

impl<'a> Matcher<'a> {
    fn new(field: &'static str, modules: &'a Modules) -> Result<Self> {
        Ok(match modules {
            Modules::Names(names) => Self::Names(names),
            // Only targets have the shorthand; elsewhere the word is a pattern that matches nothing.
            Modules::Pattern(_) if field == "target_modules" && modules.is_all_linear() => Self::AllLinear,
            Modules::Pattern(pattern) => Self::Pattern(compile(field, pattern, |p| format!(r"\A(?:{p})\z"))?),
        })
    }

    fn is_match(&self, path: &str) -> bool {
        match self {
            Self::AllLinear => true,
            Self::Pattern(pattern) => pattern.is_match(path),
            Self::Names(names) => names.iter().any(|name| is_suffix(path, name)),
        }
    }
}

/// Finds the number of the decoder layer in a path.
struct LayerPattern(Vec<Regex>);

impl LayerPattern {
    fn new(names: &[String]) -> Result<Self> {
        let field = "layers_pattern";
        if names.is_empty() {
            return Ok(Self(vec![compile(field, "", |_| r"\A.*?\.[^.]*\.(\d+)\.".into())?]));
        }
        let compiled =
            names.iter().map(|name| compile(field, name, |name| format!(r"\A(?:.*?\.)?(?:{name})\.(\d+)\.")));
        Ok(Self(compiled.collect::<Result<_>>()?))
    }

    fn layer_of(&self, path: &str) -> Option<i64> {
        self.0.iter().find_map(|pattern| pattern.captures(path)?.iter().last()??.as_str().parse().ok())
    }
}

fn compile(field: &'static str, pattern: &str, wrap: impl Fn(&str) -> String) -> Result<Regex> {
    // The pattern is compiled alone first, so that an error speaks of it and brackets cannot reach outside.
    Regex::new(pattern).and_then(|_| Regex::new(&wrap(pattern))).map_err(|error| PeftError::Pattern {
        field,
        pattern: pattern.into(),
        reason: error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").into(),
    })
}

/// Whether `name` is the path or its end after a dot.
pub(crate) fn is_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Whether `name` stands in the path between dots.
fn is_part(path: &str, name: &str) -> bool {
    format!(".{path}.").contains(&format!(".{name}."))
}

/// The error for names without a match: the short names that the model has, and those close to what was asked.
pub(crate) fn no_match(field: &'static str, names: Vec<String>, paths: &[&str]) -> PeftError {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let available: BTreeSet<String> = paths.iter().map(|path| last(path)).collect();
    let mut near: Vec<String> = Vec::new();
    for name in &names {
        let name = last(name).to_lowercase();
        let mut close: Vec<(f64, &String)> = available
            .iter()
            .map(|known| (strsim::normalized_damerau_levenshtein(&name, &known.to_lowercase()), known))
            .filter(|(likeness, _)| *likeness >= 0.5)
            .collect();
        close.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (_, known) in close.into_iter().take(2) {
            if !near.contains(known) {
                near.push(known.clone());
            }
        }
    }
    PeftError::NoMatch { field, names, near, available: available.into_iter().collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LoraConfig;

    const PATHS: [&str; 7] = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.11.self_attn.q_proj",
        "model.layers.11.mlp.up_proj",
        "lm_head",
    ];

    fn names(names: &[&str]) -> Modules {
        Modules::Names(names.iter().map(ToString::to_string).collect())
    }

    fn found(config: LoraConfig) -> Vec<usize> {
        target_layers(&config.targets(), &PATHS, Some(6), Strictness::EveryName).unwrap()
    }

    fn with(target_modules: Modules) -> LoraConfig {
        LoraConfig { target_modules, ..Default::default() }
    }

    #[test]
    fn names_match_whole_paths_and_ends_after_a_dot() {
        assert_eq!(found(with(names(&["q_proj"]))), [0, 2, 4]);
        assert_eq!(found(with(names(&["1.mlp.up_proj"]))), [3]);
        assert_eq!(found(with(names(&["lm_head", "model.layers.0.mlp.up_proj"]))), [1, 6]);
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        assert_eq!(found(with(Modules::Pattern(r".*\.1\..*_proj|lm_head".into()))), [2, 3, 6]);
        let partial = with(Modules::Pattern("q_proj".into()));
        assert!(target_layers(&partial.targets(), &PATHS, Some(6), Strictness::AnyName).is_err());
    }

    #[test]
    fn all_linear_leaves_the_output_layer_out_and_exclusions_hold() {
        assert_eq!(found(with(Modules::Pattern("All-Linear".into()))), [0, 1, 2, 3, 4, 5]);
        let config = LoraConfig { exclude_modules: Some(names(&["up_proj"])), ..Default::default() };
        assert_eq!(found(config), [0, 2, 4]);
        let config = LoraConfig { modules_to_save: vec!["mlp".into()], ..Default::default() };
        assert_eq!(found(config), [0, 2, 4]);
    }

    #[test]
    fn layers_are_chosen_by_their_number() {
        let config = LoraConfig { layers_to_transform: vec![1], ..with(names(&["q_proj"])) };
        assert_eq!(found(config.clone()), [2]);
        assert_eq!(found(LoraConfig { layers_pattern: vec!["layers".into()], ..config.clone() }), [2]);
        let wrong = LoraConfig { layers_pattern: vec!["h".into()], ..config };
        assert!(target_layers(&wrong.targets(), &PATHS, Some(6), Strictness::EveryName).is_err());
        let all_linear = |layer| LoraConfig { layers_to_transform: vec![layer], ..LoraConfig::default() };
        assert_eq!(found(all_linear(1)), [2, 3]);
        assert!(target_layers(&all_linear(2).targets(), &PATHS, Some(6), Strictness::EveryName).is_err());
    }

    #[test]
    fn a_typing_error_gets_a_suggestion() {
        let error = target_layers(&with(names(&["q_prj", "up_proj"])).targets(), &PATHS, None, Strictness::EveryName)
            .unwrap_err();
        assert_eq!(error.to_string(), "`target_modules`: nothing matches `q_prj` in this model");
        assert!(error.hint().unwrap().starts_with("did you mean `q_proj`"), "{error:?}");
        let in_file =
            target_layers(&with(names(&["q_prj", "up_proj"])).targets(), &PATHS, None, Strictness::AnyName).unwrap();
        assert_eq!(in_file, [1, 3, 5]);
    }

    #[test]
    fn a_pattern_that_python_would_take_and_we_cannot_is_named() {
        let error =
            target_layers(&with(Modules::Pattern("(?!lm).*".into())).targets(), &PATHS, None, Strictness::EveryName)
                .unwrap_err();
        assert!(error.to_string().contains("look-around"), "{error}");
    }

    #[test]
    fn modules_to_save_match_the_ends_of_module_paths() {
        let parameters = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"];
        let saved =
            |names: &[&str]| saved_parameters(&names.iter().map(ToString::to_string).collect::<Vec<_>>(), &parameters);
        assert_eq!(saved(&["lm_head", "embed_tokens"]).unwrap(), [0, 2]);
        assert_eq!(saved(&["norm"]).unwrap(), [1]);
        assert_eq!(saved(&["layers.0"]).unwrap(), [1]);
        assert!(saved(&["lm_heads"]).unwrap_err().hint().unwrap().contains("`lm_head`"));
    }

    #[test]
    fn patterns_give_the_first_match() {
        let patterns = [("layers.0.*q_proj".to_string(), 2), ("q_proj".to_string(), 4)].into();
        assert_eq!(pattern_value("rank_pattern", &patterns, PATHS[0]).unwrap(), Some(&2));
        assert_eq!(pattern_value("rank_pattern", &patterns, PATHS[2]).unwrap(), Some(&4));
        assert_eq!(pattern_value("rank_pattern", &patterns, PATHS[1]).unwrap(), None);
    }
}
