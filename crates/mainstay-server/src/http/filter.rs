//! `$filter`: the part of OData that clients of Site Recovery use: comparisons joined by `and`, `or` and parentheses.

use mainstay_control::db::Comparison;

use super::error::ApiError;

/// Deeper nesting is nobody's honest filter.
const DEPTH_MAX: usize = 16;

/// A filter.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Filter {
    All(Vec<Self>),
    Any(Vec<Self>),
    Compare {
        /// As written.
        field: String,
        comparison: Comparison,
        value: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    Open,
    Close,
    Word(String),
    Text(String),
}

/// Reads a filter.
pub(super) fn parse(text: &str) -> Result<Filter, ApiError> {
    let wrong = |what: &str| {
        ApiError::bad_request(
            "InvalidFilter",
            format!("the filter '{text}' cannot be read: {what}"),
            "Write comparisons such as JobStatus eq 'InProgress', joined by and, or, and parentheses.",
        )
    };
    let tokens = tokens(text).map_err(wrong)?;
    let mut parser = Parser { tokens: tokens.into_iter().peekable() };
    let filter = parser.any(0).map_err(wrong)?;
    if parser.tokens.next().is_some() {
        return Err(wrong("something follows its end"));
    }
    Ok(filter)
}

fn tokens(text: &str) -> Result<Vec<Token>, &'static str> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        match first {
            '(' | ')' => {
                tokens.push(if first == '(' { Token::Open } else { Token::Close });
                rest = &rest[1..];
            }
            '\'' => {
                let mut value = String::new();
                let mut at = 1;
                loop {
                    let end = rest[at..].find('\'').ok_or("a quotation mark is missing")?;
                    value.push_str(&rest[at..at + end]);
                    at += end + 1;
                    // Two of them stand for one.
                    if !rest[at..].starts_with('\'') {
                        break;
                    }
                    value.push('\'');
                    at += 1;
                }
                tokens.push(Token::Text(value));
                rest = &rest[at..];
            }
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || matches!(c, '(' | ')' | '\''));
                let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
                tokens.push(Token::Word(word.to_owned()));
                rest = after;
            }
        }
        rest = rest.trim_start();
    }
    Ok(tokens)
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
}

impl Parser {
    fn any(&mut self, depth: usize) -> Result<Filter, &'static str> {
        self.joined(depth, "or", Self::all, Filter::Any)
    }

    fn all(&mut self, depth: usize) -> Result<Filter, &'static str> {
        self.joined(depth, "and", Self::one, Filter::All)
    }

    fn joined(
        &mut self,
        depth: usize,
        word: &str,
        part: fn(&mut Self, usize) -> Result<Filter, &'static str>,
        join: fn(Vec<Filter>) -> Filter,
    ) -> Result<Filter, &'static str> {
        let first = part(self, depth)?;
        let mut parts = Vec::new();
        while self
            .tokens
            .next_if(|token| matches!(token, Token::Word(found) if found.eq_ignore_ascii_case(word)))
            .is_some()
        {
            parts.push(part(self, depth)?);
        }
        if parts.is_empty() {
            return Ok(first);
        }
        parts.insert(0, first);
        Ok(join(parts))
    }

    fn one(&mut self, depth: usize) -> Result<Filter, &'static str> {
        let field = match self.tokens.next() {
            Some(Token::Open) if depth >= DEPTH_MAX => return Err("it is nested too deeply"),
            Some(Token::Open) => {
                let inner = self.any(depth + 1)?;
                return match self.tokens.next() {
                    Some(Token::Close) => Ok(inner),
                    _ => Err("a parenthesis is not closed"),
                };
            }
            Some(Token::Word(field)) => field,
            _ => return Err("a field is missing"),
        };
        let comparison = match self.tokens.next() {
            Some(Token::Word(word)) => match word.to_lowercase().as_str() {
                "eq" => Comparison::Equal,
                "ne" => Comparison::NotEqual,
                "lt" => Comparison::Less,
                "le" => Comparison::LessOrEqual,
                "gt" => Comparison::Greater,
                "ge" => Comparison::GreaterOrEqual,
                _ => return Err("a comparison is one of eq, ne, lt, le, gt, ge"),
            },
            _ => return Err("a comparison is missing"),
        };
        match self.tokens.next() {
            Some(Token::Text(value) | Token::Word(value)) => Ok(Filter::Compare { field, comparison, value }),
            _ => Err("a value is missing"),
        }
    }
}

impl Filter {
    /// Whether a resource passes. `field` answers the value of a field named in lower case, or that there is none of the
    /// name; text is compared without regard to case.
    pub(super) fn matches(&self, field: &dyn Fn(&str) -> Option<String>) -> Result<bool, ApiError> {
        match self {
            Self::All(parts) => parts.iter().try_fold(true, |all, part| Ok(part.matches(field)? && all)),
            Self::Any(parts) => parts.iter().try_fold(false, |any, part| Ok(part.matches(field)? || any)),
            Self::Compare { field: name, comparison, value } => {
                let found = field(&name.to_lowercase()).ok_or_else(|| unknown_field(name, ""))?;
                let is_equal = found.eq_ignore_ascii_case(value);
                match comparison {
                    Comparison::Equal => Ok(is_equal),
                    Comparison::NotEqual => Ok(!is_equal),
                    _ => Err(ApiError::bad_request(
                        "InvalidFilter",
                        format!("'{name}' has no order"),
                        "Compare it with eq or ne.",
                    )),
                }
            }
        }
    }
}

/// A filter by a field that there is none of.
pub(super) fn unknown_field(name: &str, known: &str) -> ApiError {
    let remedy = if known.is_empty() { String::new() } else { format!("Fields are: {known}.") };
    ApiError::bad_request("InvalidFilter", format!("there is no field '{name}' to filter by"), remedy)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn equal(field: &str, value: &str) -> Filter {
        Filter::Compare { field: field.to_owned(), comparison: Comparison::Equal, value: value.to_owned() }
    }

    #[test]
    fn filters_are_read_as_they_are_written() {
        assert_eq!(parse("JobStatus eq 'InProgress'").unwrap(), equal("JobStatus", "InProgress"));
        assert_eq!(parse(" a eq 'it''s' ").unwrap(), equal("a", "it's"));
        let expected = Filter::Any(vec![
            equal("a", "1"),
            Filter::All(vec![equal("b", "2"), Filter::Any(vec![equal("c", "3"), equal("d", "4")])]),
        ]);
        assert_eq!(parse("a eq 1 or b eq '2' AND (c eq '3' or d eq '4')").unwrap(), expected);
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let deep = format!("{}a eq 1{}", "(".repeat(40), ")".repeat(40));
        for text in
            ["", "a", "a eq", "a is 1", "a eq 'x", "(a eq 1", "a eq 1)", "a eq 1 b eq 2", "and", &deep]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_resource_is_judged_by_its_fields() {
        let field = |name: &str| match name {
            "severity" => Some("Warning".to_owned()),
            _ => None,
        };
        let judge = |text: &str| parse(text).unwrap().matches(&field);
        assert!(judge("Severity eq 'warning'").unwrap());
        assert!(!judge("Severity ne 'Warning' or Severity eq 'OK'").unwrap());
        assert!(judge("colour eq 'red'").is_err());
        assert!(judge("Severity gt 'A'").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[ a-z'()é]{0,40}") {
            let _ = parse(&text);
        }
    }
}
