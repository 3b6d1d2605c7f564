//! The OpenAPI document of `/api/v1`, from the table of its operations and the types of `mainstay-api`.

use hyper::StatusCode;
use mainstay_api::arm::ErrorBody;
use schemars::{JsonSchema as _, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    VAULT_PARAMETER,
    routes::{OPERATIONS, Operation, Route},
};

/// Errors that every request can meet.
const ALWAYS: &[StatusCode] = &[StatusCode::BAD_REQUEST, StatusCode::INTERNAL_SERVER_ERROR];
/// Errors of requests that need a sign-in.
const SIGNED: &[StatusCode] =
    &[StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN, StatusCode::TOO_MANY_REQUESTS];
/// Errors of requests with a body.
const WITH_BODY: &[StatusCode] = &[StatusCode::REQUEST_TIMEOUT, StatusCode::PAYLOAD_TOO_LARGE];

/// The document.
pub(super) fn document() -> Value {
    // OpenAPI 3.1 takes schemas of this draft as they are.
    let settings = || {
        let mut settings = SchemaSettings::draft2020_12();
        settings.definitions_path = "/components/schemas".into();
        settings
    };
    let mut requests = settings().for_deserialize().into_generator();
    let mut answers = settings().for_serialize().into_generator();
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(format!("/api/v1{}", operation.path)).or_insert_with(|| json!({}));
        path[operation.method.as_str().to_lowercase()] = described(operation, &mut requests, &mut answers);
    }
    let mut schemas = requests.take_definitions(true);
    schemas.extend(answers.take_definitions(true));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Mainstay",
            "description": "What the Azure Resource Manager API of site recovery has no word for.",
            "version": env!("CARGO_PKG_VERSION"),
            "license": { "name": "Apache 2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [{ "bearer": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of the server, or an access token of a service principal.",
                },
            },
            "schemas": schemas,
        },
    })
}

fn described(operation: &Operation, requests: &mut SchemaGenerator, answers: &mut SchemaGenerator) -> Value {
    let is_signed = matches!(operation.route, Route::Signed(..));
    let mut responses = Map::new();
    match operation.answer {
        Some(answer) => {
            let content = json!({ "application/json": { "schema": answer(answers) } });
            responses.insert("200".to_owned(), json!({ "description": "Done.", "content": content }));
        }
        None => {
            responses.insert("204".to_owned(), json!({ "description": "Done." }));
        }
    }
    let mut errors = [ALWAYS, operation.errors].concat();
    errors.extend(if is_signed { SIGNED } else { &[] });
    errors.extend(if operation.request.is_some() { WITH_BODY } else { &[] });
    errors.sort_unstable();
    for status in errors {
        responses.insert(status.as_str().to_owned(), error(status, answers));
    }
    let mut described = json!({
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": responses,
    });
    match operation.route {
        Route::Open(_) => described["security"] = json!([]),
        Route::Signed(role, _) => described["description"] = json!(format!("Needs the role {role:?}.")),
    }
    let mut parameters: Vec<Value> = operation
        .parameters()
        .map(|name| {
            // An empty segment would be another path.
            let schema = json!({ "type": "string", "minLength": 1 });
            json!({ "name": name, "in": "path", "required": true, "schema": schema })
        })
        .collect();
    if operation.is_in_vault() {
        parameters.push(json!({
            "name": VAULT_PARAMETER,
            "in": "query",
            "description": "The vault, as NAME or GROUP/NAME; without it the server's first.",
            "schema": { "type": "string" },
        }));
    }
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if let Some(request) = operation.request {
        let content = json!({ "application/json": { "schema": request(requests) } });
        described["requestBody"] = json!({ "required": true, "content": content });
    }
    described
}

fn error(status: StatusCode, answers: &mut SchemaGenerator) -> Value {
    let schema = answers.subschema_for::<ErrorBody>();
    let mut described = json!({
        "description": format!("{}.", status.canonical_reason().unwrap_or_default()),
        "content": { "application/json": { "schema": schema } },
    });
    let header = match status {
        StatusCode::UNAUTHORIZED => Some(("WWW-Authenticate", String::json_schema(answers))),
        StatusCode::TOO_MANY_REQUESTS => Some(("Retry-After", u32::json_schema(answers))),
        _ => None,
    };
    if let Some((name, schema)) = header {
        described["headers"] = json!({ name: { "required": true, "schema": schema } });
    }
    described
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use hyper::Method;

    use super::{
        super::routes::{Found, find},
        *,
    };

    fn checked_in() -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/api/openapi-v1.json");
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn the_document_that_is_checked_in_is_the_servers() {
        assert!(
            checked_in() == super::super::document_text(),
            "docs/api/openapi-v1.json is not what the server answers; run `cargo xtask openapi`"
        );
    }

    #[test]
    fn every_path_of_the_document_is_served_and_every_operation_is_in_it() {
        let document: Value = serde_json::from_str(&checked_in()).unwrap();
        let mut described = BTreeSet::new();
        for (path, methods) in document["paths"].as_object().unwrap() {
            let below = path.strip_prefix("/api/v1").unwrap();
            let asked: Vec<&str> = below.split('/').filter(|segment| !segment.is_empty()).collect();
            for method in methods.as_object().unwrap().keys() {
                let method: Method = method.to_uppercase().parse().unwrap();
                let Found::Operation(found) = find(&method, &asked) else { panic!("{method} {path}") };
                assert_eq!((&found.method, found.path), (&method, below));
                described.insert((method.to_string(), below.to_owned()));
            }
        }
        let served: BTreeSet<_> = OPERATIONS
            .iter()
            .map(|operation| (operation.method.to_string(), operation.path.to_owned()))
            .collect();
        assert_eq!(described, served);
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let names: BTreeSet<_> = OPERATIONS.iter().map(|operation| operation.name).collect();
        assert_eq!(names.len(), OPERATIONS.len());
    }
}
