# Each builder builds for its own platform. "docker build --platform" builds for another one under
# emulation. The version of Go is that of go.mod.
FROM golang:1.26 AS build
WORKDIR /src

# A separate layer, which changes only with the dependencies.
COPY go.mod go.sum ./
RUN go mod download

COPY . .
# The final image has no libc, so cgo is off. -s -w omits the debug information.
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o /todo-app .

# CA certificates to verify Neon, the user nonroot (65532), and no shell. There is no HEALTHCHECK,
# because the image has no program for it: the platform requests GET /health/live.
FROM gcr.io/distroless/static-debian13:nonroot
COPY --from=build /todo-app /todo-app
# The default of PORT.
EXPOSE 8080
# The exec form: the service is process 1 and receives SIGTERM.
ENTRYPOINT ["/todo-app"]
