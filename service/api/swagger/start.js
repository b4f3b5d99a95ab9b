// Shows the API's own document; relative, so that it is found below the path of a proxy.
// Keys are not stored: a reload forgets what was entered under "Authorize".

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  deepLinking: true,
  displayRequestDuration: true,
  docExpansion: "list",
  defaultModelsExpandDepth: 0,
});
