-- POST of a JSON document. Arguments: its length in bytes, then fields to add.

local text

function init(arguments)
    local size = tonumber(arguments[1])
    local fields = {["Content-Type"] = "application/json"}
    for index = 2, #arguments do
        local name, value = arguments[index]:match("^(.-): (.*)$")
        fields[name] = value
    end
    text = wrk.format("POST", nil, fields, "{\"text\":\"" .. string.rep("x", size - 11) .. "\"}")
end

function request() return text end
