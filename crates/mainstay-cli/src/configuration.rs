//! Settings of server and agent: a file, and the environment over it.
//!
//! Each key is also a variable: the prefix and the key in capitals, with the section before it if it is in one
//! (`MAINSTAY_SERVER_SMTP_HOST`). What a value is follows from what the key takes: text as it stands, otherwise a value as in TOML,
//! otherwise a list separated by commas. A variable that is empty counts as not set; one that no key belongs to is refused,
//! because whoever has set it expects something of it.

use std::{collections::BTreeMap, ffi::OsString, path::Path};

use anyhow::Context as _;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::exit::UsageError;

/// Whose settings, as far as they differ.
pub(crate) struct Daemon {
    prefix: &'static str,
    /// Sections of the file, each with the keys that it cannot be without.
    sections: &'static [(&'static str, &'static [&'static str])],
}

/// The server.
pub(crate) const SERVER: Daemon =
    Daemon { prefix: "MAINSTAY_SERVER_", sections: &[("smtp", &["host", "sender"])] };

/// A host's agent.
pub(crate) const AGENT: Daemon = Daemon { prefix: "MAINSTAY_AGENT_", sections: &[] };

/// Names the file itself; the command line reads it.
const CONFIG: &str = "CONFIG";

/// Reads the settings from a file, if there is one, and the environment.
pub(crate) fn read<T: DeserializeOwned>(daemon: &Daemon, file: Option<&Path>) -> anyhow::Result<T> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?,
        None => String::new(),
    };
    let settings = variables(daemon, std::env::vars_os()).and_then(|variables| {
        merge(daemon, &text, &variables).map_err(|problem| match (problem, file) {
            (Problem::File(error), Some(path)) => format!("configuration {}: {error}", path.display()),
            (Problem::File(error) | Problem::Environment(error), _) => error,
        })
    });
    settings.map_err(|error| UsageError(error).into())
}

/// What is wrong, and where.
#[derive(Debug)]
enum Problem {
    File(String),
    Environment(String),
}

/// The variables that are settings, with their values.
fn variables(
    daemon: &Daemon,
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<BTreeMap<String, String>, String> {
    let mut variables = BTreeMap::new();
    for (name, value) in environment {
        let Ok(name) = name.into_string() else { continue };
        if name.strip_prefix(daemon.prefix).is_none_or(|key| key == CONFIG) || value.is_empty() {
            continue;
        }
        let value = value.into_string().map_err(|_other| format!("{name} is not UTF-8"))?;
        variables.insert(name, value);
    }
    Ok(variables)
}

/// The file's settings with the variables' in the places of theirs.
fn merge<T: DeserializeOwned>(
    daemon: &Daemon,
    text: &str,
    variables: &BTreeMap<String, String>,
) -> Result<T, Problem> {
    // As it stands, because errors then have the line; it may still lack what the environment has.
    let file = toml::from_str::<T>(text).map_err(|error| Problem::File(error.to_string()));
    if variables.is_empty() {
        return file;
    }
    let mut table: Table = toml::from_str(text).map_err(|error| Problem::File(error.to_string()))?;
    for (name, raw) in variables {
        let place = Place::of(daemon, name);
        let value = value::<T>(&place, raw)
            .map_err(|error| Problem::Environment(format!("{name}={raw}: {}", error.trim())))?;
        place.set(&mut table, value);
    }
    let merged = table.try_into::<T>();
    merged.map_err(|error| match file {
        Err(problem) => problem,
        Ok(_) => {
            let names: Vec<_> = variables.keys().map(String::as_str).collect();
            Problem::Environment(format!("{}, with {}", error.to_string().trim(), names.join(", ")))
        }
    })
}

/// Where a variable's value belongs.
struct Place {
    section: Option<(&'static str, &'static [&'static str])>,
    key: String,
}

impl Place {
    fn of(daemon: &Daemon, name: &str) -> Self {
        let key = name.strip_prefix(daemon.prefix).unwrap_or(name).to_ascii_lowercase();
        let section = daemon.sections.iter().find_map(|(section, needed)| {
            let rest = key.strip_prefix(section)?.strip_prefix('_')?;
            Some(((*section, *needed), rest.to_owned()))
        });
        match section {
            Some((section, key)) => Self { section: Some(section), key },
            None => Self { section: None, key },
        }
    }

    /// Puts a value there. What stands in a section's place without being one is the file's mistake, and told as that.
    fn set(&self, table: &mut Table, value: Value) {
        let Some((section, _)) = self.section else {
            table.insert(self.key.clone(), value);
            return;
        };
        let section = table.entry(section).or_insert_with(|| Value::Table(Table::new()));
        if let Some(section) = section.as_table_mut() {
            section.insert(self.key.clone(), value);
        }
    }

    /// Settings with this value and nothing else but what its section cannot be without.
    fn alone(&self, value: Value) -> Table {
        let mut table = Table::new();
        if let Some((section, needed)) = self.section {
            let filled = needed.iter().map(|key| ((*key).to_owned(), Value::String("x".to_owned())));
            table.insert(section.to_owned(), Value::Table(filled.collect()));
        }
        self.set(&mut table, value);
        table
    }
}

/// The value that a key takes a text for.
fn value<T: DeserializeOwned>(place: &Place, raw: &str) -> Result<Value, String> {
    let list = || raw.split(',').map(str::trim).filter(|part| !part.is_empty());
    let readings = [
        Some(Value::String(raw.to_owned())),
        as_toml(raw),
        Some(Value::Array(list().map(|part| Value::String(part.to_owned())).collect())),
    ];
    let mut error = String::new();
    for (index, reading) in readings.into_iter().enumerate() {
        let Some(reading) = reading else { continue };
        match place.alone(reading.clone()).try_into::<T>() {
            Ok(_) => return Ok(reading),
            // That it is no list either helps nobody.
            Err(other) if index < 2 => error = other.to_string(),
            Err(_) => {}
        }
    }
    Err(error)
}

fn as_toml(raw: &str) -> Option<Value> {
    let mut table: Table = toml::from_str(&format!("value = {raw}")).ok()?;
    (table.len() == 1).then(|| table.remove("value")).flatten()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use mainstay_agent::AgentConfig;
    use mainstay_server::ServerConfig;

    use super::*;

    fn with<T: DeserializeOwned>(
        daemon: &Daemon,
        text: &str,
        environment: &[(&str, &str)],
    ) -> Result<T, Problem> {
        let environment = environment.iter().map(|(name, value)| (name.into(), value.into()));
        merge(daemon, text, &variables(daemon, environment).unwrap())
    }

    fn server(text: &str, environment: &[(&str, &str)]) -> ServerConfig {
        with(&SERVER, text, environment).unwrap()
    }

    fn refused(text: &str, environment: &[(&str, &str)]) -> String {
        match with::<ServerConfig>(&SERVER, text, environment).unwrap_err() {
            Problem::Environment(error) => error,
            Problem::File(error) => panic!("the file is fine: {error}"),
        }
    }

    #[test]
    fn variables_win_over_the_file_and_leave_the_rest() {
        let text = "store_dir = '/file'\nstore_reserve_mib = 7\nnames = ['a']\nlisten = '127.0.0.1:1'";
        let read = server(
            text,
            &[
                ("MAINSTAY_SERVER_STORE_DIR", "/environment"),
                ("MAINSTAY_SERVER_LISTEN", "127.0.0.1:2"),
                ("MAINSTAY_SERVER_OLD_COPIES", "report"),
                ("MAINSTAY_SERVER_SCRUB_INTERVAL_HOURS", "0"),
                ("MAINSTAY_SERVER_CONFIG", "/etc/server.toml"),
                ("MAINSTAY_SERVER_AGENT_ENDPOINT", ""),
                ("MAINSTAY_AGENT_NICE", "99"),
                ("PATH", "/bin"),
            ],
        );
        let expected = ServerConfig {
            store_dir: Some(PathBuf::from("/environment")),
            listen: "127.0.0.1:2".parse().unwrap(),
            old_copies: Value::from("report").try_into().unwrap(),
            scrub_interval_hours: 0,
            ..ServerConfig::parse(text).unwrap()
        };
        assert_eq!(read, expected);
        assert_eq!(server(text, &[]), ServerConfig::parse(text).unwrap());
    }

    #[test]
    fn lists_are_separated_by_commas_or_as_in_toml() {
        let names = |value| server("names = ['a']", &[("MAINSTAY_SERVER_NAMES", value)]).names;
        assert_eq!(names("dr.example.net, 10.0.0.1"), ["dr.example.net", "10.0.0.1"]);
        assert_eq!(names("dr"), ["dr"]);
        assert_eq!(names("['a,b', \"c\"]"), ["a,b", "c"]);
        assert_eq!(names("[]"), [""; 0]);
        assert_eq!(names(""), ["a"]);
    }

    #[test]
    fn a_section_can_come_from_both() {
        let text = "[smtp]\nhost = 'mail.example.org'";
        let sender = ("MAINSTAY_SERVER_SMTP_SENDER", "mainstay@example.org");
        let numbers = [("MAINSTAY_SERVER_SMTP_PORT", "2525"), ("MAINSTAY_SERVER_SMTP_USER", "2525"), sender];
        let smtp = server(text, &numbers).smtp.unwrap();
        assert_eq!((smtp.host.as_str(), smtp.port), ("mail.example.org", Some(2525)));
        assert_eq!((smtp.user.as_deref(), smtp.sender.as_str()), (Some("2525"), sender.1));
        let smtp = server("", &[("MAINSTAY_SERVER_SMTP_HOST", "h"), sender]).smtp.unwrap();
        assert_eq!(smtp.host, "h");
        let lacking = refused("", &[sender]);
        assert!(lacking.contains("host") && lacking.contains(sender.0), "{lacking}");
    }

    #[test]
    fn what_no_key_takes_is_refused_by_the_variables_name() {
        for (name, value, word) in [
            ("MAINSTAY_SERVER_STOREDIR", "/x", "unknown field"),
            ("MAINSTAY_SERVER_SMTP", "mail", "invalid type"),
            ("MAINSTAY_SERVER_SMTP_HOSTS", "mail", "unknown field"),
            ("MAINSTAY_SERVER_STORE_RESERVE_MIB", "much", "much"),
            ("MAINSTAY_SERVER_STORE_RESERVE_MIB", "-1", "-1"),
            ("MAINSTAY_SERVER_LISTEN", "here", "here"),
            ("MAINSTAY_SERVER_OLD_COPIES", "burn", "burn"),
            ("MAINSTAY_SERVER_STORE_RESERVE_MIB", "1\nlisten = '1.2.3.4:5'", "invalid"),
        ] {
            let error = refused("", &[(name, value)]);
            assert!(error.starts_with(name) && error.contains(word), "{error}");
        }
        let broken = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
        let environment = [("MAINSTAY_SERVER_STORE_DIR".into(), broken)];
        assert!(variables(&SERVER, environment.into_iter()).unwrap_err().contains("STORE_DIR"));
    }

    #[test]
    fn mistakes_of_the_file_are_told_with_their_line() {
        for environment in [&[][..], &[("MAINSTAY_SERVER_NAMES", "a")]] {
            let problem =
                with::<ServerConfig>(&SERVER, "names = ['a']\nno_such = 1", environment).unwrap_err();
            let Problem::File(error) = problem else { panic!("{problem:?}") };
            assert!(error.contains("line 2") && error.contains("no_such"), "{error}");
        }
    }

    #[test]
    fn the_agent_has_its_own() {
        let environment = [
            ("MAINSTAY_AGENT_NICE", "5"),
            ("MAINSTAY_AGENT_NETWORKS", "bridge:br0,bridge:br1"),
            ("MAINSTAY_SERVER_LISTEN", "nonsense"),
        ];
        let read: AgentConfig = with(&AGENT, "nice = 3", &environment).unwrap();
        assert_eq!((read.nice, read.networks.len()), (5, 2));
        assert!(with::<AgentConfig>(&AGENT, "", &[("MAINSTAY_AGENT_NICE", "-1")]).is_err());
    }
}
